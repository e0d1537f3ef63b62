// The Python face of pyops._host: build info, CPU probe, measured ceilings, Philox, and the oracle.

#include <algorithm>

#include <pybind11/stl.h>

#include "common/attention_choice.h"
#include "common/im2col.h"
#include "common/philox.h"
#include "cpu/blocking.h"
#include "cpu/conv_choice.h"
#include "host/host.h"
#include "host/oracle.h"

namespace py = pybind11;

namespace {

using Ints = std::vector<int64_t>;

struct ValueErrors {
  void check(bool condition, const char* message) const {
    if (!condition) throw py::value_error(message);
  }
};

// Given by CMakeLists.txt.
#if !defined(PYOPS_BUILD_TYPE)
#define PYOPS_BUILD_TYPE "unknown"
#endif
#if !defined(PYOPS_CUDA_ARCHITECTURES)
#define PYOPS_CUDA_ARCHITECTURES ""
#endif

// No date and no path: the same source and compiler give the same bytes.
py::dict build_info() {
  py::dict info;
#if defined(__clang__)
  info["compiler"] = "clang";
  info["compiler_version"] = __clang_version__;
#else
  info["compiler"] = "gcc";
  info["compiler_version"] = __VERSION__;
#endif
  info["cxx_standard"] = static_cast<long>(__cplusplus / 100 % 100);
  info["build_type"] = PYOPS_BUILD_TYPE;
  info["cuda_architectures"] = PYOPS_CUDA_ARCHITECTURES;
  info["pybind11"] = PYBIND11_TOSTRING(PYBIND11_VERSION_MAJOR) "." PYBIND11_TOSTRING(PYBIND11_VERSION_MINOR);
  return info;
}

// What the CPU kernels will do with rows [M, N] and with planes [N, C, S], from the sizes they are compiled with.
py::dict row_blocking(int64_t M, int64_t N, int64_t element_size) {
  using namespace pyops::blocking;
  py::dict plan;
  plan["block"] = block_elements;
  plan["shared"] = N > wide_elements;
  plan["forward_group"] = forward_grouped(N) ? 4 : 1;
  plan["backward_group"] = backward_grouped(N) ? 2 : 1;
  plan["streamed"] = is_streamed(M * N, element_size);
  return plan;
}

py::dict plane_blocking(int64_t N, int64_t C, int64_t S, int64_t element_size) {
  using namespace pyops::blocking;
  py::dict plan;
  plan["block"] = block_elements;
  plan["streamed"] = is_streamed(N * C * S, element_size);
  return plan;
}

// What sizes say about the kernel of an attention: L queries, S keys, G query heads per key head, head sizes D and E.
py::dict attention_choice(int64_t L, int64_t S, int64_t G, int64_t D, int64_t E) {
  using namespace pyops::attention;
  py::dict choice;
  choice["few"] = has_few_queries(L, G);
  choice["decode"] = may_decode(L, S);
  choice["hopper"] = suits_hopper_heads(D, E);
  return choice;
}

// In how many parts CUDA cuts the keys of a forward pass; 0: not at all.
int64_t attention_decode_parts(int64_t B, int64_t H, int64_t G, int64_t L, int64_t S, int64_t E, bool half,
                               int64_t processors) {
  return pyops::attention::decode_parts(B, H, G, L, S, E, half, processors);
}

// What the CPU kernels will do with a convolution or its gradient in the input (`transposed`), all sizes in canonical form
// (common/conv_binding.h): `size` is that of x, `positions` that of y where it is not the most that fit.
py::dict conv_plan(int64_t N, int64_t C, int64_t K, int64_t groups, const Ints& size, const Ints& positions,
                   const Ints& taps, const Ints& stride, const Ints& padding, const Ints& dilation,
                   const std::string& algorithm, int64_t threads, bool transposed, bool is_float,
                   int64_t element_size) {
  namespace conv = pyops::conv;
  namespace choice = pyops::conv_choice;
  const conv::Sizes s =
      conv::sizes_of(ValueErrors{}, N, C, K, groups, size, positions, taps, stride, padding, dilation);
  const int64_t in = (transposed ? K : C) / groups, out = (transposed ? C : K) / groups;
  py::dict plan;
  int tile = 0;
  int64_t workspace = 0;
  const auto add = [&](const conv::Space& space) {
    tile = is_float ? choice::winograd_tile(space, N, in, out, algorithm) : 0;
    workspace = std::max(workspace, choice::workspace(space, N, in, out, groups, tile, threads, element_size));
    if (!choice::is_winograd_shape(space)) return;
    const double taps9 = 9.0 * double(in) * double(out) * double(N) * double(space.positions());
    for (const int64_t m : {2, 4})
      plan[m == 2 ? "winograd2" : "winograd4"] = choice::winograd_cost(space, N, in, out, m) / std::max(taps9, 1.0);
  };
  transposed ? conv::each_phase(s, add) : add(conv::forward_space(s));
  plan["algorithm"] = tile == 0 ? "gemm" : tile == 2 ? "winograd2" : "winograd4";
  plan["workspace"] = workspace;
  plan["weight_workspace"] = choice::weight_gradient_workspace(threads, element_size);
  return plan;
}

// Offsets of the elements that meet in one product, by the functions that kernels index with: of x (-1: padding) and of y.
// `at` is an example and a position, {n, d, h, w}; channels are {channel of x, of y}, counts {channels of x, of y}.
std::pair<int64_t, int64_t> conv_offsets(const Ints& size, const Ints& taps, const Ints& stride, const Ints& padding,
                                         const Ints& dilation, const Ints& at, const Ints& tap, const Ints& channels,
                                         const Ints& counts, bool channels_last) {
  namespace conv = pyops::conv;
  const conv::Sizes sizes =
      conv::sizes_of(ValueErrors{}, 1, counts[0], counts[1], 1, size, {}, taps, stride, padding, dilation);
  const conv::Space s = conv::forward_space(sizes);
  const auto narrow = [](int64_t v) { return static_cast<int32_t>(v); };
  const int64_t x = s.input(s.d.input(narrow(at[1]), narrow(tap[0])), s.h.input(narrow(at[2]), narrow(tap[1])),
                            s.w.input(narrow(at[3]), narrow(tap[2])));
  const int64_t y = s.output({static_cast<uint32_t>(at[0]), narrow(at[1]), narrow(at[2]), narrow(at[3])});
  const auto offset = [&](int which, int64_t positions, int64_t position) {
    return conv::plane_of(at[0], channels[which], counts[which], positions, channels_last) +
           position * (channels_last ? counts[which] : 1);
  };
  return {x < 0 ? -1 : offset(0, s.in_plane(), x), offset(1, s.out_plane(), y)};
}

// The same for im2col: offsets in the image (-1: padding) and in the columns.
std::pair<int64_t, int64_t> im2col_offsets(int64_t H, int64_t W, const Ints& kernel, const Ints& stride,
                                           const Ints& padding, const Ints& dilation, int64_t plane, int64_t p,
                                           int64_t q, int64_t r, int64_t s) {
  namespace unfolding = pyops::unfolding;
  const auto [h, w] = unfolding::axes_of(ValueErrors{}, H, W, kernel, stride, padding, dilation);
  const int32_t row = h.input(static_cast<int32_t>(p), static_cast<int32_t>(r));
  const int32_t column = w.input(static_cast<int32_t>(q), static_cast<int32_t>(s));
  const bool inside = row >= 0 && row < h.size && column >= 0 && column < w.size;
  return {inside ? unfolding::row_offset(h, w, plane, row) + column : -1,
          unfolding::column_offset(h, w, plane, r, s) + p * w.count + q};
}

py::dict cpu_features() {
  const pyops::host::CpuFeatures features = pyops::host::cpu_features();
  py::dict result;
  result["model"] = features.model;
  result["logical_cores"] = features.logical_cores;
  result["usable_cores"] = features.usable_cores;
  result["instructions"] = features.instructions;
  result["caches"] = features.caches;
  return result;
}

py::list variants() {
  py::list result;
  for (const auto& [name, supported] : pyops::host::cpu_variants()) {
    py::dict variant;
    variant["capability"] = name;
    variant["supported"] = supported;
    result.append(variant);
  }
  return result;
}

py::dict ceilings(int threads, double seconds) {
  if (threads < 1 || threads > 1024) throw py::value_error("_host.ceilings: threads must be in [1, 1024]");
  if (!(seconds > 0 && seconds <= 60)) throw py::value_error("_host.ceilings: seconds must be in (0, 60]");
  pyops::host::Ceilings measured;
  {
    const py::gil_scoped_release release;
    measured = pyops::host::measure_ceilings(threads, seconds);
  }
  py::dict fma;
  double highest = 0;
  for (const auto& [name, rate] : measured.fma_fp32) {
    fma[py::str(name)] = rate;
    highest = std::max(highest, rate);
  }
  py::dict result;
  result["copy_bandwidth"] = std::max(measured.copy_stream, measured.copy_memcpy);
  result["fma_rate"] = highest;
  result["copy_stream"] = measured.copy_stream;
  result["copy_memcpy"] = measured.copy_memcpy;
  result["copy_bytes"] = measured.copy_bytes;
  result["fma_by_capability"] = fma;
  return result;
}

}  // namespace

PYBIND11_MODULE(_host, module) {
  using namespace pybind11::literals;
  module.doc() = "What is not a tensor op: build info, CPU probe, measured ceilings, Philox, long-double oracle.";
  module.def("build_info", &build_info, "Compiler, C++ standard, build type and CUDA architectures of this build.");
  module.def("cpu_features", &cpu_features, "Model, cores, usable instructions and cache sizes in bytes.");
  module.def("variants", &variants,
             "Instruction sets compiled into libpyops.so, narrow to wide: capability, supported.");
  module.def(
      "ceilings", &ceilings, "threads"_a = 1, "seconds"_a = 0.3,
      "Measures for about `seconds`: copy_bandwidth in bytes/s (read + written; the better of non-temporal stores "
      "and memcpy) and fma_rate in fp32 flop/s, of all threads together.");
  module.def("row_blocking", &row_blocking, "M"_a, "N"_a, "element_size"_a,
             "How the CPU kernels cut rows [M, N]: block, shared, forward_group, backward_group, streamed.");
  module.def("plane_blocking", &plane_blocking, "N"_a, "C"_a, "S"_a, "element_size"_a,
             "How the CPU kernels cut planes [N, C, S]: block, streamed.");
  module.def("attention_choice", &attention_choice, "L"_a, "S"_a, "G"_a, "D"_a, "E"_a,
             "Which attention kernels the sizes admit: few (CPU), decode and hopper (CUDA).");
  module.def("attention_decode_parts", &attention_decode_parts, "B"_a, "H"_a, "G"_a, "L"_a, "S"_a, "E"_a, "half"_a,
             "processors"_a, "In how many parts CUDA cuts the keys of few queries; 0: not at all.");
  module.def(
      "conv_plan", &conv_plan, "N"_a, "C"_a, "K"_a, "groups"_a, "size"_a, "positions"_a, "taps"_a, "stride"_a,
      "padding"_a, "dilation"_a, "algorithm"_a, "threads"_a, "transposed"_a, "is_float"_a, "element_size"_a,
      "Which algorithm the CPU takes for a convolution or its gradient in the input, what Winograd's cost beside "
      "the sum over taps, and upper bounds of the workspace in bytes, of the gradient in the weight as well.");
  module.def("conv_offsets", &conv_offsets, "size"_a, "taps"_a, "stride"_a, "padding"_a, "dilation"_a, "at"_a, "tap"_a,
             "channels"_a, "counts"_a, "channels_last"_a, "Offsets in x and y of what meets in a convolution.");
  module.def("im2col_offsets", &im2col_offsets, "H"_a, "W"_a, "kernel"_a, "stride"_a, "padding"_a, "dilation"_a,
             "plane"_a, "p"_a, "q"_a, "r"_a, "s"_a, "Offsets in image and columns of what im2col copies.");
  module.def(
      "philox4x32",
      [](uint64_t seed, uint64_t subsequence, uint64_t offset) {
        const pyops::Words4 w = pyops::philox4x32(seed, subsequence, offset);
        return py::make_tuple(w[0], w[1], w[2], w[3]);
      },
      "seed"_a, "subsequence"_a, "offset"_a, "Four random 32-bit words, as the kernels draw them.");
  pyops::host::bind_oracle(module);
}
