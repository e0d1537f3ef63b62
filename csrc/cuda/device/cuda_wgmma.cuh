// The vocabulary on CUDA, sm_90a: asynchronous warpgroup matrix products and register reallocation.
#pragma once

namespace pyops {

// Operand descriptor. K-major: stride_bytes separates groups of 8 rows, and leading_bytes (no swizzle only) the 16-byte
// columns. MN-major: leading_bytes separates chunks of one swizzle width along M/N, and stride_bytes groups of 8 along
// K. A tile starts on a multiple of 8 swizzle rows (1024, 512, 256 bytes); a K step inside a row is made by adding its
// bytes to the address.
PYOPS_DEVICE uint64_t smem_desc(const void* p, uint32_t leading_bytes, uint32_t stride_bytes, Swizzle swizzle) {
  const auto field = [](uint32_t x) { return static_cast<uint64_t>((x & 0x3FFFF) >> 4); };
  const uint64_t layout = swizzle == Swizzle::b128 ? 1 : swizzle == Swizzle::b64 ? 2 : swizzle == Swizzle::b32 ? 3 : 0;
  return field(smem_address(p)) | field(leading_bytes) << 16 | field(stride_bytes) << 32 | layout << 62;
}

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <int Registers>
PYOPS_DEVICE void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}
template <int Registers>
PYOPS_DEVICE void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}
PYOPS_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
PYOPS_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int Pending>
PYOPS_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}
// The same, and what was summed in d is there: to the compiler d changes here, so that no use of it moves before the wait.
template <int Pending, int N>
PYOPS_DEVICE void wgmma_wait(float (&d)[N]) {
  wgmma_wait<Pending>();
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
template <int Pending, int N, int M>
PYOPS_DEVICE void wgmma_wait(float (&first)[N], float (&second)[M]) {
  wgmma_wait<Pending>(first);
#pragma unroll
  for (int i = 0; i < M; ++i) asm volatile("" : "+f"(second[i])::"memory");
}

// Register lists for the inline assembly: names %0.. and the operands bound to them.
#define PYOPS_NAMES_4 "%0, %1, %2, %3"
#define PYOPS_NAMES_8 PYOPS_NAMES_4 ", %4, %5, %6, %7"
#define PYOPS_NAMES_12 PYOPS_NAMES_8 ", %8, %9, %10, %11"
#define PYOPS_NAMES_16 PYOPS_NAMES_12 ", %12, %13, %14, %15"
#define PYOPS_NAMES_20 PYOPS_NAMES_16 ", %16, %17, %18, %19"
#define PYOPS_NAMES_24 PYOPS_NAMES_20 ", %20, %21, %22, %23"
#define PYOPS_NAMES_32 PYOPS_NAMES_24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define PYOPS_NAMES_40 PYOPS_NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define PYOPS_NAMES_48 PYOPS_NAMES_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define PYOPS_NAMES_64 PYOPS_NAMES_48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define PYOPS_NAMES_80 PYOPS_NAMES_64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define PYOPS_NAMES_96 PYOPS_NAMES_80 ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define PYOPS_NAMES_112 \
  PYOPS_NAMES_96 ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define PYOPS_NAMES_128 \
  PYOPS_NAMES_112 ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define PYOPS_BIND_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define PYOPS_BIND_8(i) PYOPS_BIND_4(i), PYOPS_BIND_4(i + 4)
#define PYOPS_BIND_16(i) PYOPS_BIND_8(i), PYOPS_BIND_8(i + 8)
#define PYOPS_BIND_32(i) PYOPS_BIND_16(i), PYOPS_BIND_16(i + 16)
#define PYOPS_BIND_64(i) PYOPS_BIND_32(i), PYOPS_BIND_32(i + 32)
#define PYOPS_BIND_12(i) PYOPS_BIND_8(i), PYOPS_BIND_4(i + 8)
#define PYOPS_BIND_20(i) PYOPS_BIND_16(i), PYOPS_BIND_4(i + 16)
#define PYOPS_BIND_24(i) PYOPS_BIND_16(i), PYOPS_BIND_8(i + 16)
#define PYOPS_BIND_40(i) PYOPS_BIND_32(i), PYOPS_BIND_8(i + 32)
#define PYOPS_BIND_48(i) PYOPS_BIND_32(i), PYOPS_BIND_16(i + 32)
#define PYOPS_BIND_80(i) PYOPS_BIND_64(i), PYOPS_BIND_16(i + 64)
#define PYOPS_BIND_96(i) PYOPS_BIND_64(i), PYOPS_BIND_32(i + 64)
#define PYOPS_BIND_112(i) PYOPS_BIND_96(i), PYOPS_BIND_16(i + 96)
#define PYOPS_BIND_128(i) PYOPS_BIND_64(i), PYOPS_BIND_64(i + 64)

// R = N / 2 accumulators; the operands after them are numbered from R.
#define PYOPS_WGMMA(N, R, TYPE, A, B, P, TA, TB)                                                                    \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE \
               "." TYPE " {" PYOPS_NAMES_##R "}, %" #A ", %" #B ", p, 1, 1, %" #TA ", %" #TB ";\n}"                 \
               : PYOPS_BIND_##R(0)                                                                                  \
               : "l"(desc_a), "l"(desc_b), "r"(static_cast<int>(accumulate)), "n"(static_cast<int>(MajorA)),        \
                 "n"(static_cast<int>(MajorB)))
#define PYOPS_WGMMA_REG(N, R, TYPE, A0, A1, A2, A3, B, P, TB)                                                       \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE \
               "." TYPE " {" PYOPS_NAMES_##R "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B ", p, 1, 1, %" #TB \
                                             ";\n}"                                                                 \
               : PYOPS_BIND_##R(0)                                                                                  \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(desc_b), "r"(static_cast<int>(accumulate)),        \
                 "n"(static_cast<int>(MajorB)))

// Calls the macro for the type; the branches are compile-time.
#define PYOPS_WGMMA_N(N, R, ...)              \
  if constexpr (Columns == N) {               \
    if constexpr (std::is_same_v<T, bf16>) {  \
      PYOPS_WGMMA(N, R, "bf16", __VA_ARGS__); \
    } else {                                  \
      PYOPS_WGMMA(N, R, "f16", __VA_ARGS__);  \
    }                                         \
  }
#define PYOPS_WGMMA_REG_N(N, R, ...)              \
  if constexpr (Columns == N) {                   \
    if constexpr (std::is_same_v<T, bf16>) {      \
      PYOPS_WGMMA_REG(N, R, "bf16", __VA_ARGS__); \
    } else {                                      \
      PYOPS_WGMMA_REG(N, R, "f16", __VA_ARGS__);  \
    }                                             \
  }

namespace detail {
template <int n>
inline constexpr bool wgmma_columns = n == 8 || n == 16 || n == 24 || n == 32 || n == 40 || n == 48 || n == 64 ||
                                      n == 80 || n == 96 || n == 128 || n == 160 || n == 192 || n == 224 || n == 256;
}  // namespace detail

// d += A B for a 64 x 16 tile A and a 16 x Columns tile B, both in shared memory. Issued by all 128 threads of a
// warpgroup; d may be touched after wgmma_wait only. accumulate = false starts from zero.
template <class T, int Columns, Major MajorA = Major::k, Major MajorB = Major::k>
PYOPS_DEVICE void wgmma_m64k16(float (&d)[Columns / 2], uint64_t desc_a, uint64_t desc_b, bool accumulate = true) {
  static_assert(detail::wgmma_columns<Columns> && (std::is_same_v<T, bf16> || std::is_same_v<T, fp16>));
  PYOPS_WGMMA_N(8, 4, 4, 5, 6, 7, 8)
  PYOPS_WGMMA_N(16, 8, 8, 9, 10, 11, 12)
  PYOPS_WGMMA_N(24, 12, 12, 13, 14, 15, 16)
  PYOPS_WGMMA_N(32, 16, 16, 17, 18, 19, 20)
  PYOPS_WGMMA_N(40, 20, 20, 21, 22, 23, 24)
  PYOPS_WGMMA_N(48, 24, 24, 25, 26, 27, 28)
  PYOPS_WGMMA_N(64, 32, 32, 33, 34, 35, 36)
  PYOPS_WGMMA_N(80, 40, 40, 41, 42, 43, 44)
  PYOPS_WGMMA_N(96, 48, 48, 49, 50, 51, 52)
  PYOPS_WGMMA_N(128, 64, 64, 65, 66, 67, 68)
  PYOPS_WGMMA_N(160, 80, 80, 81, 82, 83, 84)
  PYOPS_WGMMA_N(192, 96, 96, 97, 98, 99, 100)
  PYOPS_WGMMA_N(224, 112, 112, 113, 114, 115, 116)
  PYOPS_WGMMA_N(256, 128, 128, 129, 130, 131, 132)
}

// The same with A in registers: warp w of the warpgroup holds rows 16 w .. 16 w + 15 as the A fragment of mma_m16n8k16.
template <class T, int Columns, Major MajorB = Major::k>
PYOPS_DEVICE void wgmma_m64k16_reg(float (&d)[Columns / 2], const uint32_t (&a)[4], uint64_t desc_b,
                                   bool accumulate = true) {
  static_assert(detail::wgmma_columns<Columns> && (std::is_same_v<T, bf16> || std::is_same_v<T, fp16>));
  PYOPS_WGMMA_REG_N(8, 4, 4, 5, 6, 7, 8, 9, 10)
  PYOPS_WGMMA_REG_N(16, 8, 8, 9, 10, 11, 12, 13, 14)
  PYOPS_WGMMA_REG_N(24, 12, 12, 13, 14, 15, 16, 17, 18)
  PYOPS_WGMMA_REG_N(32, 16, 16, 17, 18, 19, 20, 21, 22)
  PYOPS_WGMMA_REG_N(40, 20, 20, 21, 22, 23, 24, 25, 26)
  PYOPS_WGMMA_REG_N(48, 24, 24, 25, 26, 27, 28, 29, 30)
  PYOPS_WGMMA_REG_N(64, 32, 32, 33, 34, 35, 36, 37, 38)
  PYOPS_WGMMA_REG_N(80, 40, 40, 41, 42, 43, 44, 45, 46)
  PYOPS_WGMMA_REG_N(96, 48, 48, 49, 50, 51, 52, 53, 54)
  PYOPS_WGMMA_REG_N(128, 64, 64, 65, 66, 67, 68, 69, 70)
  PYOPS_WGMMA_REG_N(160, 80, 80, 81, 82, 83, 84, 85, 86)
  PYOPS_WGMMA_REG_N(192, 96, 96, 97, 98, 99, 100, 101, 102)
  PYOPS_WGMMA_REG_N(224, 112, 112, 113, 114, 115, 116, 117, 118)
  PYOPS_WGMMA_REG_N(256, 128, 128, 129, 130, 131, 132, 133, 134)
}

#endif

}  // namespace pyops
