// Warp and block reductions in a fixed order, so that results are bitwise reproducible. Shared by both compilers.
#pragma once

namespace pyops {

namespace detail {
struct Sum {
  template <class T>
  PYOPS_DEVICE T operator()(T a, T b) const {
    return a + b;
  }
};
// A NaN on either side stays, as in torch's amax and amin.
struct Max {
  template <class T>
  PYOPS_DEVICE T operator()(T a, T b) const {
    return (a != a || a > b) ? a : b;
  }
};
struct Min {
  template <class T>
  PYOPS_DEVICE T operator()(T a, T b) const {
    return (a != a || a < b) ? a : b;
  }
};
PYOPS_DEVICE int flat_thread() {
  return static_cast<int>(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z));
}
}  // namespace detail

// Every group of Width neighbouring lanes reduces; all 32 lanes take part and all get their group's result.
template <int Width = 32, class T, class Op>
PYOPS_DEVICE T warp_reduce(T v, Op op) {
  static_assert(Width >= 1 && Width <= 32 && (Width & (Width - 1)) == 0);
#pragma unroll
  for (int offset = Width / 2; offset > 0; offset /= 2) v = op(v, __shfl_xor_sync(0xffffffffu, v, offset));
  return v;
}
template <int Width = 32, class T>
PYOPS_DEVICE T warp_sum(T v) {
  return warp_reduce<Width>(v, detail::Sum());
}
template <int Width = 32, class T>
PYOPS_DEVICE T warp_max(T v) {
  return warp_reduce<Width>(v, detail::Max());
}
template <int Width = 32, class T>
PYOPS_DEVICE T warp_min(T v) {
  return warp_reduce<Width>(v, detail::Min());
}

template <class T>
struct BlockScratch {
  T warp[32];
};

// The second barrier lets the caller use the scratch again at once.
template <class T, class Op>
PYOPS_DEVICE T block_reduce(T v, Op op, T identity, BlockScratch<T>& scratch) {
  const int thread = detail::flat_thread();
  const int warps = static_cast<int>(blockDim.x * blockDim.y * blockDim.z) / 32;
  v = warp_reduce<32>(v, op);
  if (thread % 32 == 0) scratch.warp[thread / 32] = v;
  __syncthreads();
  v = thread % 32 < warps ? scratch.warp[thread % 32] : identity;
  v = warp_reduce<32>(v, op);
  __syncthreads();
  return v;
}
template <class T>
PYOPS_DEVICE T block_sum(T v, BlockScratch<T>& scratch) {
  return block_reduce(v, detail::Sum(), T(0), scratch);
}
// The identity is the calling thread's own value: no largest number is needed, and NaN and -inf pass through.
template <class T>
PYOPS_DEVICE T block_max(T v, BlockScratch<T>& scratch) {
  return block_reduce(v, detail::Max(), v, scratch);
}

}  // namespace pyops
