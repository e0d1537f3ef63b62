// pyops._host: what is not a tensor op. Nothing here knows torch; a program without this module loses only reports.
#pragma once

#include <cstddef>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace pyops::host {

struct CpuFeatures {
  std::string model;
  int logical_cores = 0;                     // CPUs of the machine
  int usable_cores = 0;                      // CPUs this process may run on
  std::map<std::string, bool> instructions;  // usable ones: the CPU has them and the system saves their registers
  std::map<std::string, long> caches;        // bytes seen by CPU 0, by name: L1d, L2, L3
};
CpuFeatures cpu_features();

// Instruction sets that csrc/cpu was compiled for, narrow to wide, and whether this CPU runs them.
std::vector<std::pair<std::string, bool>> cpu_variants();

// Of all threads together.
struct Ceilings {
  double copy_stream = 0;                                // bytes/s read + written, non-temporal stores
  double copy_memcpy = 0;                                // the same through memcpy
  size_t copy_bytes = 0;                                 // size of the buffer copied
  std::vector<std::pair<std::string, double>> fma_fp32;  // flop/s per instruction set, narrow to wide
};
Ceilings measure_ceilings(int threads, double seconds);

}  // namespace pyops::host
