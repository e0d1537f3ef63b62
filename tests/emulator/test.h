// A small test frame that runs the same .cu on the emulator and on a GPU. A test returns "" or what went wrong; an
// exception (a finding of the emulator, a CUDA error) is reported as its text.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>
#include <vector>

#include "cuda/device.cuh"
#if defined(PYOPS_EMULATOR)
#include "emulator/memory.h"
#endif

namespace pyops::test {

struct Test {
  const char* name;
  std::string (*run)(int variant);
};
inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}
struct Register {
  Register(const char* name, std::string (*run)(int)) { tests().push_back({name, run}); }
};

// Outputs of a conformance kernel, kept for comparison with a GPU's.
inline std::vector<unsigned char>& recorded() {
  static std::vector<unsigned char> bytes;
  return bytes;
}

// Memory that host and kernel both see; on the emulator a registered tensor with poison around it.
template <class T>
class Buffer {
 public:
  Buffer(const char* name, size_t count, bool writable) : count_(count) {
#if defined(PYOPS_EMULATOR)
#if defined(PYOPS_EMULATOR_ASAN)
    const size_t bytes = count * sizeof(T);  // its red zone begins right behind
#else
    const size_t bytes = (count * sizeof(T) + 255) / 256 * 256 + 256;
#endif
    void* memory = nullptr;
    if (posix_memalign(&memory, 256, bytes) != 0) throw std::bad_alloc();
    data_ = static_cast<T*>(memory);
    std::memset(static_cast<void*>(data_), 0xFF, bytes);
    emulator::register_range(data_, count * sizeof(T), writable, name);
#else
    static_cast<void>(name), static_cast<void>(writable);
    detail::check_cuda(cudaMallocManaged(&data_, count * sizeof(T)), "managed memory");
    std::memset(static_cast<void*>(data_), 0xFF, count * sizeof(T));
#endif
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() {
#if defined(PYOPS_EMULATOR)
    std::free(data_);
#else
    cudaFree(data_);
#endif
  }
  T* get() { return data_; }
  size_t size() const { return count_; }
  T& operator[](size_t i) { return data_[i]; }
  template <class F>
  Buffer& fill(F f) {
    for (size_t i = 0; i < count_; ++i) data_[i] = f(i);
    return *this;
  }
  void record() {
    const auto* bytes = reinterpret_cast<const unsigned char*>(data_);
    recorded().insert(recorded().end(), bytes, bytes + count_ * sizeof(T));
  }

 private:
  T* data_;
  size_t count_;
};

inline void synchronize() {
#if !defined(PYOPS_EMULATOR)
  detail::check_cuda(cudaDeviceSynchronize(), "kernel");
#endif
}
inline void forget_buffers() {
#if defined(PYOPS_EMULATOR)
  emulator::clear_ranges();
#endif
}

// Small integers: exact in every type, so results can be compared exactly.
inline float digit(size_t i) { return static_cast<float>(static_cast<int>(i * 7919 % 13) - 6); }

inline std::string failure(const char* file, int line, const std::string& text) {
  return std::string(file) + ":" + std::to_string(line) + ": " + text;
}

}  // namespace pyops::test

#define PYOPS_TEST(NAME)                                              \
  static std::string NAME([[maybe_unused]] int variant);              \
  static const ::pyops::test::Register register_##NAME(#NAME, &NAME); \
  static std::string NAME([[maybe_unused]] int variant)
#define PYOPS_EXPECT(CONDITION) \
  if (!(CONDITION)) return ::pyops::test::failure(__FILE__, __LINE__, #CONDITION)
#define PYOPS_EXPECT_EQUAL(GOT, WANT, INDEX)                                                                \
  if (const double pyops_got = static_cast<double>(GOT), pyops_want = static_cast<double>(WANT);            \
      !(pyops_got == pyops_want))                                                                           \
  return ::pyops::test::failure(__FILE__, __LINE__,                                                         \
                                #GOT " [" + std::to_string(INDEX) + "]: got " + std::to_string(pyops_got) + \
                                    ", expected " + std::to_string(pyops_want))
