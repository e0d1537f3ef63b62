// Counters of the whole process, summed over launches.
#pragma once

#include "emulator/engine.h"

namespace pyops::emulator {

void add_statistics(const Statistics& s);
void reset_statistics();
uint64_t statistic(const char* key);  // UINT64_MAX: no such counter

}  // namespace pyops::emulator
