// One kernel per primitive with a documented layout (sm_80), on random bits. The recorded outputs of a GPU are the
// golden files that the emulator is held against; tests/test_emulator.py says what is compared exactly and what with a
// tolerance.
#include "test.h"

using namespace pyops;
using test::Buffer;

__global__ void conformance_ldmatrix(uint32_t* out) {
  struct Storage {
    alignas(16) uint16_t row[32][8];
  };
  auto& s = shared_storage<Storage>();
  const unsigned lane = threadIdx.x;
  for (unsigned i = 0; i < 8; ++i) s.row[lane][i] = static_cast<uint16_t>(lane * 256 + i * 17);
  __syncwarp();
  uint32_t r[4], t[4];
  ldmatrix_x4(r, s.row[lane]);
  ldmatrix_x4_trans(t, s.row[lane]);
  for (unsigned i = 0; i < 4; ++i) {
    out[lane * 8 + i] = r[i];
    out[lane * 8 + 4 + i] = t[i];
  }
}
PYOPS_TEST(conformance_exact_ldmatrix) {
  Buffer<uint32_t> out("out", 256, true);
  launch(conformance_ldmatrix, {.grid = 1, .block = 32, .smem = 512}, out.get());
  test::synchronize();
  out.record();
  return "";
}

// Fragments of normal-sized random values; what differs between machines is rounding and the order of the sum.
template <class T>
PYOPS_DEVICE uint32_t random_pair(uint64_t index) {
  const auto u = philox_uniform4(1, index, 0);
  if constexpr (std::is_same_v<T, float>) {
    return to_tf32(u[0] * 2.0f - 1.0f);
  } else {
    return pack2<T>(u[0] * 2.0f - 1.0f, u[1] * 2.0f - 1.0f);
  }
}
template <class T>
__global__ void conformance_mma(float* out) {
  const unsigned lane = threadIdx.x;
  uint32_t a[4], b[2];
  float d[4];
  for (unsigned i = 0; i < 4; ++i) a[i] = random_pair<T>(lane * 16 + i);
  for (unsigned i = 0; i < 2; ++i) b[i] = random_pair<T>(lane * 16 + 4 + i);
  for (unsigned i = 0; i < 4; ++i) d[i] = philox_uniform4(2, lane * 4 + i, 0)[0];
  if constexpr (std::is_same_v<T, float>) {
    mma_m16n8k8_tf32(d, a, b);
  } else {
    mma_m16n8k16<T>(d, a, b);
  }
  for (unsigned i = 0; i < 4; ++i) out[lane * 4 + i] = d[i];
}
template <class T>
std::string record_mma() {
  Buffer<float> out("out", 128, true);
  launch(conformance_mma<T>, {.grid = 1, .block = 32}, out.get());
  test::synchronize();
  out.record();
  return "";
}
PYOPS_TEST(conformance_float_mma_bf16) { return record_mma<bf16>(); }
PYOPS_TEST(conformance_float_mma_fp16) { return record_mma<fp16>(); }
PYOPS_TEST(conformance_float_mma_tf32) { return record_mma<float>(); }
