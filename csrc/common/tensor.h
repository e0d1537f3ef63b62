// The only door from pyops to torch: checked pointers in, allocated tensors out.
//
// A binding opens one OpScope, destructures the shapes it expects, and takes every pointer through
// in / in_optional / out with a dtype and a shape. Kernels see pointers, sizes and a stream, never a tensor.
#pragma once

#include <algorithm>
#include <array>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "common/host_device.h"
#if defined(PYOPS_EMULATOR)
#include "emulator/memory.h"
#endif

namespace pyops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <class T>
inline constexpr ScalarType scalar_type_of = ScalarType::Undefined;
template <>
inline constexpr ScalarType scalar_type_of<float> = ScalarType::Float;
template <>
inline constexpr ScalarType scalar_type_of<double> = ScalarType::Double;
template <>
inline constexpr ScalarType scalar_type_of<half_t> = ScalarType::Half;
template <>
inline constexpr ScalarType scalar_type_of<bfloat16_t> = ScalarType::BFloat16;
template <>
inline constexpr ScalarType scalar_type_of<uint8_t> = ScalarType::Byte;
template <>
inline constexpr ScalarType scalar_type_of<int32_t> = ScalarType::Int;
template <>
inline constexpr ScalarType scalar_type_of<int64_t> = ScalarType::Long;
template <>
inline constexpr ScalarType scalar_type_of<bool> = ScalarType::Bool;

// ShapeRef as an argument: {N, C} as written, or those of a tensor. They live as long as what they were made from.
class ShapeRef {
 public:
  ShapeRef() = default;  // {}: no dimensions, a tensor of one element; without it nvcc takes {} for one of size 0
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Winit-list-lifetime"  // as an argument it outlives the call
  ShapeRef(std::initializer_list<int64_t> sizes) : data_(sizes.begin()), rank_(sizes.size()) {}
#pragma GCC diagnostic pop
  explicit ShapeRef(const Tensor& like) : ShapeRef(like.sizes()) {}
  explicit ShapeRef(torch::headeronly::IntHeaderOnlyArrayRef values) : data_(values.data()), rank_(values.size()) {}
  const int64_t* data() const { return data_; }
  size_t rank() const { return rank_; }
  int64_t operator[](size_t i) const { return data_[i]; }

 private:
  const int64_t* data_ = nullptr;
  size_t rank_ = 0;
};

namespace detail {

inline std::string shape_text(ShapeRef sizes) {
  std::ostringstream text;
  text << '[';
  for (size_t i = 0; i < sizes.rank(); ++i) text << (i ? ", " : "") << sizes[i];
  text << ']';
  return text.str();
}

// torch's stream lookup lives in libtorch_cuda, which a CPU build of torch does not have and which no library may
// link against; csrc/common/stream.cpp finds it at run time.
void* current_cuda_stream(int32_t device);

// csrc/common/large_pages.cpp
inline constexpr int64_t large_page_bytes = 4 << 20;
void prefer_large_pages(void* p, size_t bytes);

#if defined(PYOPS_CUDA)
using Guard = torch::stable::accelerator::DeviceGuard;
#endif

}  // namespace detail

// What one call of one op needs: its name for messages, the device it runs on, and the right to hand out pointers.
class OpScope {
 public:
  OpScope(const char* op, const Tensor& like)
      : op_(op),
        device_(like.device())
#if defined(PYOPS_CUDA)
        ,
        guard_(like.get_device_index())
#endif
  {
#if defined(PYOPS_EMULATOR)
    emulator::clear_ranges();
#endif
  }
#if defined(PYOPS_EMULATOR)
  ~OpScope() { emulator::clear_ranges(); }
#endif
  OpScope(const OpScope&) = delete;
  OpScope& operator=(const OpScope&) = delete;

  template <class... Parts>
  void check(bool condition, const Parts&... parts) const {
    if (condition) return;
    std::ostringstream text;
    text << op_ << ": ";
    ((text << parts), ...);
    throw std::runtime_error(text.str());
  }

  // Pointer to a contiguous tensor of exactly this dtype and shape, for reading.
  template <class T>
  const T* in(const Tensor& tensor, const char* name, ShapeRef shape) const {
    check_layout<T>(tensor, name, shape);
    auto* pointer = static_cast<const T*>(tensor.const_data_ptr());
#if defined(PYOPS_EMULATOR)
    emulator::register_range(pointer, size_t(tensor.numel()) * sizeof(T), false, name);
#endif
    return pointer;
  }

  // As `in`; null where the argument was None.
  template <class T>
  const T* in_optional(const OptionalTensor& tensor, const char* name, ShapeRef shape) const {
    return tensor.has_value() ? in<T>(*tensor, name, shape) : nullptr;
  }

  // Pointer to a contiguous tensor of exactly this dtype and shape, for writing.
  template <class T>
  T* out(const Tensor& tensor, const char* name, ShapeRef shape) const {
    check_layout<T>(tensor, name, shape);
    auto* pointer = static_cast<T*>(tensor.mutable_data_ptr());
#if defined(PYOPS_EMULATOR)
    emulator::register_range(pointer, size_t(tensor.numel()) * sizeof(T), true, name);
#endif
    return pointer;
  }

  // Uninitialised contiguous tensor on the device of the call.
  // Through the C shim, which costs a fifth of torch::stable::empty's look-up of aten::empty by name.
  Tensor empty(ShapeRef shape, ScalarType dtype) const {
    using torch::stable::detail::from, torch::stable::detail::to;
    std::array<int64_t, 64> strides;
    check(shape.rank() <= strides.size(), "a result of more than ", strides.size(), " dimensions");
    int64_t stride = 1;
    for (size_t i = shape.rank(); i-- > 0; stride *= std::max<int64_t>(shape[i], 1)) strides[i] = stride;
    AtenTensorHandle tensor = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(shape.rank()), shape.data(), strides.data(),
                                                           to<int32_t>(from(dtype)), to<int32_t>(from(device_.type())),
                                                           device_.index(), &tensor));
    Tensor result(tensor);
    const int64_t bytes = result.numel() * int64_t(result.element_size());
    if (bytes >= detail::large_page_bytes && device_.is_cpu())
      detail::prefer_large_pages(result.mutable_data_ptr(), size_t(bytes));
    return result;
  }
  template <class T>
  Tensor empty(ShapeRef shape) const {
    return empty(shape, scalar_type_of<T>);
  }

#if defined(PYOPS_CUDA)
  void* stream() const { return detail::current_cuda_stream(device_.index()); }
#else
  void* stream() const { return nullptr; }
#endif

 private:
  template <class T>
  void check_layout(const Tensor& tensor, const char* name, ShapeRef shape) const {
    const auto dtype = tensor.scalar_type();
    check(dtype == scalar_type_of<T>, name, " has the wrong dtype: got ", dtype, ", expected ", scalar_type_of<T>);
    const ShapeRef sizes(tensor);
    bool same = sizes.rank() == shape.rank();
    for (size_t i = 0; same && i < shape.rank(); ++i) same = sizes[i] == shape[i];
    // the texts are built for the message alone: a call has ten tensors and microseconds
    if (!same)
      check(false, name, " has the wrong shape: got ", detail::shape_text(sizes), ", expected ",
            detail::shape_text(shape));
    check(tensor.is_contiguous(), name, " must be contiguous");
    check(tensor.device() == device_, name, " is on another device than the first argument");
  }

  const char* op_;
  torch::stable::Device device_;
#if defined(PYOPS_CUDA)
  detail::Guard guard_;
#endif
};

// Calls f.template operator()<scalar_t>() for the element type of a floating-point tensor.
template <class F>
decltype(auto) dispatch_floating(const OpScope& op, ScalarType dtype, F&& f) {
  op.check(dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
               dtype == ScalarType::Half,
           "expected a float32, float64, bfloat16 or float16 tensor, got ", dtype);
  switch (dtype) {
    case ScalarType::Double:
      return f.template operator()<double>();
    case ScalarType::BFloat16:
      return f.template operator()<bfloat16_t>();
    case ScalarType::Half:
      return f.template operator()<half_t>();
    default:
      return f.template operator()<float>();
  }
}

// Calls f.template operator()<scalar_t, weight_t>(): weights have the type of the input or the type of its sums.
template <class F>
decltype(auto) dispatch_floating_mixed(const OpScope& op, ScalarType dtype, std::optional<ScalarType> weight_dtype,
                                       F&& f) {
  return dispatch_floating(op, dtype, [&]<class scalar_t>() {
    using acc_t = accumulate_t<scalar_t>;
    if (weight_dtype.value_or(scalar_type_of<acc_t>) == scalar_type_of<acc_t>)
      return f.template operator()<scalar_t, acc_t>();
    op.check(*weight_dtype == scalar_type_of<scalar_t>, "weight and bias must be ", scalar_type_of<scalar_t>, " or ",
             scalar_type_of<acc_t>, ", got ", *weight_dtype);
    return f.template operator()<scalar_t, scalar_t>();
  });
}

inline std::optional<ScalarType> dtype_of(const OptionalTensor& a) {
  return a.has_value() ? std::optional(a->scalar_type()) : std::nullopt;
}
inline std::optional<ScalarType> dtype_of(const OptionalTensor& a, const OptionalTensor& b) {
  return a.has_value() ? dtype_of(a) : dtype_of(b);
}

}  // namespace pyops
