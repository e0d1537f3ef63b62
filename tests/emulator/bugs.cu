// Planted bugs, up to sm_80: each kernel is right as variant 0 and wrong as variant 1. tests/test_emulator.py expects a
// finding of the right kind for the wrong one, none for the right one, and none once the detector is silenced.
#include "test.h"

using namespace pyops;
using test::Buffer;

struct Exchange {
  float value[64];
  float other[64];
};
constexpr size_t shared_bytes = 1024;

template <class... Params>
std::string run(void (*kernel)(Params...), unsigned threads, int variant, unsigned blocks = 1) {
  Buffer<float> in("in", 256, false), out("out", 256, true);
  in.fill([](size_t i) { return static_cast<float>(i); });
  out.fill([](size_t) { return 0.0f; });
  launch(kernel, {.grid = blocks, .block = threads, .smem = shared_bytes}, static_cast<const float*>(in.get()),
         out.get(), variant);
  test::synchronize();
  return "";
}

__global__ void missing_barrier(const float* in, float* out, int bug) {
  auto& s = shared_storage<Exchange>();
  const unsigned t = threadIdx.x;
  s.value[t] = in[t];
  if (!bug) __syncthreads();
  out[t] = s.value[63 - t];
}
PYOPS_TEST(bug_missing_barrier) { return run(missing_barrier, 64, variant); }

struct Powers {
  float value[6];
};
PYOPS_DEVICE Powers powers_of(const float* in, unsigned t) {
  Powers p;
  p.value[0] = in[t];
  for (int i = 1; i < 6; ++i) p.value[i] = p.value[i - 1] * p.value[0];
  return p;
}
// What a function returns is built where it goes to; called twice, so that only PYOPS_DEVICE puts it in line.
__global__ void missing_barrier_after_returned_struct(const float* in, float* out, int bug) {
  auto& s = shared_storage<Powers[32]>();
  const unsigned t = threadIdx.x;
  s[t] = powers_of(in, t);
  if (!bug) __syncthreads();
  out[t] = s[31 - t].value[5] + powers_of(in, t + 32).value[3];
}
PYOPS_TEST(bug_missing_barrier_after_returned_struct) {
  return run(missing_barrier_after_returned_struct, 32, variant);
}

// The second round overwrites what slow threads of the first still read.
__global__ void write_after_read(const float* in, float* out, int bug) {
  auto& s = shared_storage<Exchange>();
  const unsigned t = threadIdx.x;
  float sum = 0;
  for (int round = 0; round < 2; ++round) {
    s.value[t] = in[round * 64 + t];
    __syncthreads();
    sum += s.value[63 - t];
    if (!bug) __syncthreads();
  }
  out[t] = sum;
}
PYOPS_TEST(bug_shared_race) { return run(write_after_read, 64, variant); }

__global__ void missing_syncwarp(const float* in, float* out, int bug) {
  auto& s = shared_storage<Exchange>();
  const unsigned t = threadIdx.x;
  s.value[t] = in[t];
  if (!bug) __syncwarp();
  out[t] = s.value[t ^ 1];
}
PYOPS_TEST(bug_missing_syncwarp) { return run(missing_syncwarp, 32, variant); }

__global__ void uninitialised_read(const float* in, float* out, int bug) {
  auto& s = shared_storage<Exchange>();
  const unsigned t = threadIdx.x;
  if (!bug || t != 40) s.value[t] = in[t];
  __syncthreads();
  out[t] = s.value[63 - t];
}
PYOPS_TEST(bug_uninitialised_shared) { return run(uninitialised_read, 64, variant); }

__global__ void read_past_end(const float* in, float* out, int bug) {
  const unsigned t = threadIdx.x;
  out[t] = in[bug ? 193 + t : t];
}
PYOPS_TEST(bug_read_past_end) { return run(read_past_end, 64, variant); }

__global__ void write_past_end(const float*, float* out, int bug) { out[bug ? threadIdx.x + 225 : threadIdx.x] = 1.0f; }
PYOPS_TEST(bug_write_past_end) { return run(write_past_end, 32, variant); }

__global__ void write_to_input(const float* in, float* out, int bug) {
  const unsigned t = threadIdx.x;
  (bug ? const_cast<float*>(in) : out)[t] = 1.0f;
}
PYOPS_TEST(bug_write_to_input) { return run(write_to_input, 32, variant); }

__global__ void two_blocks_one_address(const float* in, float* out, int bug) {
  out[bug ? 0 : blockIdx.x * 32 + threadIdx.x] = in[threadIdx.x];
}
PYOPS_TEST(bug_two_blocks_one_address) { return run(two_blocks_one_address, 1, variant, 2); }

__global__ void read_of_other_block(const float* in, float* out, int bug) {
  const unsigned i = blockIdx.x * 32 + threadIdx.x;
  out[i] = in[i];
  if (bug) out[128 + i] = out[i ^ 32];
}
PYOPS_TEST(bug_read_of_other_block) { return run(read_of_other_block, 32, variant, 2); }

__global__ void plain_add(const float*, float* out, int bug) {
  if (bug && threadIdx.x == 1) {
    out[0] += 1.0f;
  } else {
    atomicAdd(&out[0], 1.0f);
  }
}
PYOPS_TEST(bug_plain_add_against_atomic) { return run(plain_add, 2, variant); }

__global__ void ticket_without_fence(const float*, float* out, int bug) {
  out[blockIdx.x] = 1.0f;
  if (!bug) __threadfence();
  const float ticket = atomicAdd(&out[100], 1.0f);
  if (ticket == static_cast<float>(gridDim.x - 1)) {
    for (unsigned b = 0; b < gridDim.x; ++b) out[101] += out[b];
  }
}
PYOPS_TEST(bug_missing_threadfence) { return run(ticket_without_fence, 1, variant, 3); }

__global__ void shuffle_mask(const float* in, float* out, int bug) {
  const unsigned t = threadIdx.x;
  float v = in[t];
  if (t < 16) v += __shfl_xor_sync(bug ? 0xffffffffu : 0x0000ffffu, v, 1);
  out[t] = v;
}
PYOPS_TEST(bug_shuffle_mask) { return run(shuffle_mask, 32, variant); }

__global__ void lane_outside_mask(const float* in, float* out, int bug) {
  const unsigned t = threadIdx.x;
  out[t] = __shfl_down_sync(bug ? 0x0000ffffu : 0xffffffffu, in[t], 1);
}
PYOPS_TEST(bug_lane_outside_mask) { return run(lane_outside_mask, 32, variant); }

__global__ void exited_lane(const float* in, float* out, int bug) {
  const unsigned t = threadIdx.x;
  if (bug && t >= 20) return;
  out[t] = warp_sum(in[t]);
}
PYOPS_TEST(bug_exited_lane) { return run(exited_lane, 32, variant); }

__global__ void divergent_barrier(const float* in, float* out, int bug) {
  const unsigned t = threadIdx.x;
  if (bug && t < 32) {
    __syncthreads();
  } else {
    out[t] = in[t];
    __syncthreads();
  }
}
PYOPS_TEST(bug_divergent_barrier) { return run(divergent_barrier, 64, variant); }

__global__ void early_return(const float* in, float* out, int bug) {
  const unsigned t = threadIdx.x;
  if (bug && t >= 40) return;
  __syncthreads();
  out[t] = in[t];
}
PYOPS_TEST(bug_return_before_barrier) { return run(early_return, 64, variant); }

struct CopyTarget {
  alignas(16) float value[64][4];
};
__global__ void missing_copy_wait(const float* in, float* out, int bug) {
  auto& s = shared_storage<CopyTarget>();
  const unsigned t = threadIdx.x;
  cp_async<16>(s.value[t], in + t * 4);
  cp_async_commit();
  if (!bug) cp_async_wait<0>();
  out[t] = s.value[t][0];
  cp_async_wait<0>();
}
__global__ void missing_copy_barrier(const float* in, float* out, int bug) {
  auto& s = shared_storage<CopyTarget>();
  const unsigned t = threadIdx.x;
  cp_async<16>(s.value[t], in + t * 4);
  cp_async_commit();
  cp_async_wait<0>();
  if (!bug) __syncthreads();
  out[t] = s.value[31 - t][0];
}
__global__ void copy_never_waited(const float* in, float* out, int bug) {
  auto& s = shared_storage<CopyTarget>();
  const unsigned t = threadIdx.x;
  cp_async<16>(s.value[t], in + t * 4);
  cp_async_commit();
  if (!bug) cp_async_wait<0>();
  out[t] = 0.0f;
}
PYOPS_TEST(bug_missing_cp_async_wait) { return run(missing_copy_wait, 32, variant); }
PYOPS_TEST(bug_missing_cp_async_barrier) { return run(missing_copy_barrier, 32, variant); }
PYOPS_TEST(bug_cp_async_never_waited) { return run(copy_never_waited, 32, variant); }

__global__ void misaligned_vector(const float* in, float* out, int bug) {
  store_vec(out + threadIdx.x * 4, load_vec<4>(in + bug + threadIdx.x * 4));
}
PYOPS_TEST(bug_misaligned_vector_load) { return run(misaligned_vector, 32, variant); }

__global__ void misaligned_word(const float* in, float* out, int bug) {
  const auto* words = reinterpret_cast<const float*>(reinterpret_cast<const char*>(in) + 2 * bug);
  out[threadIdx.x] = words[threadIdx.x];
}
PYOPS_TEST(bug_misaligned_word) { return run(misaligned_word, 32, variant); }

__global__ void past_member_array(const float* in, float* out, int bug) {
  auto& s = shared_storage<Exchange>();
  const unsigned t = threadIdx.x;
  s.value[t] = in[t];
  s.other[t] = in[t];
  __syncthreads();
  out[t] = s.value[t + static_cast<unsigned>(bug)];  // value[64] is other[0]: initialised, in bounds of the struct
}
PYOPS_TEST(bug_index_past_member_array) { return run(past_member_array, 64, variant); }

__global__ void shared_overrun(const float* in, float* out, int bug) {
  auto& s = shared_storage<Exchange>();
  const unsigned t = threadIdx.x;
  float* flat = s.value;
  flat[bug ? t + 225 : t] = in[t];
  out[t] = 0.0f;
}
PYOPS_TEST(bug_shared_overrun) { return run(shared_overrun, 32, variant); }

struct Larger {
  float value[4096];
};
__global__ void storage_too_small(const float*, float* out, int bug) {
  if (bug) {
    shared_storage<Larger>().value[threadIdx.x] = 0.0f;
  } else {
    shared_storage<Exchange>().value[threadIdx.x] = 0.0f;
  }
  out[threadIdx.x] = 0.0f;
}
PYOPS_TEST(bug_launch_with_too_little_shared_memory) { return run(storage_too_small, 32, variant); }

__global__ void local_of_other_thread(const float* in, float* out, int bug) {
  struct Pointers {
    const float* local[32];
  };
  auto& s = shared_storage<Pointers>();
  const unsigned t = threadIdx.x;
  volatile float mine = in[t];
  s.local[t] = const_cast<const float*>(&mine);
  __syncwarp();
  out[t] = *s.local[bug ? t ^ 1 : t];
  __syncwarp();
}
PYOPS_TEST(bug_local_memory_of_other_thread) { return run(local_of_other_thread, 32, variant); }

__global__ void endless_spin(const float* in, float* out, int bug) {
  if (bug) {
    while (atomicAdd(&out[0], 0.0f) == 0.0f) __nanosleep(20);
  }
  out[threadIdx.x] = in[threadIdx.x];
}
PYOPS_TEST(bug_endless_spin) { return run(endless_spin, 1, variant); }
