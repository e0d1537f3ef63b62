// Pointers for ops that work element by element on many tensors at once: any shape, in memory order.
#pragma once

#include "common/tensor.h"

namespace pyops {

// A tensor of the shape and strides of `like`, which fills its memory without a gap, on the device of the call.
template <class T>
void check_flat(const OpScope& op, const Tensor& tensor, const char* name, const Tensor& like,
                const torch::stable::Device& device) {
  const auto dtype = tensor.scalar_type();
  op.check(dtype == scalar_type_of<T>, name, " has the wrong dtype: got ", dtype, ", expected ", scalar_type_of<T>);
  op.check(tensor.device() == device, name, " is on another device than the first argument");
  const auto sizes = tensor.sizes(), wanted = like.sizes(), strides = tensor.strides(), pattern = like.strides();
  const int64_t numel = tensor.numel();
  bool same = sizes.size() == wanted.size(), gapless = true;
  int64_t extent = 1;
  for (size_t i = 0; same && i < sizes.size(); ++i) {
    same = sizes[i] == wanted[i] && (strides[i] == pattern[i] || sizes[i] == 1 || numel == 0);
    gapless &= strides[i] >= 0;
    extent += (sizes[i] - 1) * strides[i];
  }
  if (!same)
    op.check(false, name, " has the wrong shape or strides: got ", detail::shape_text(ShapeRef(sizes)), " by ",
             detail::shape_text(ShapeRef(strides)), ", expected ", detail::shape_text(ShapeRef(wanted)), " by ",
             detail::shape_text(ShapeRef(pattern)));
  op.check(numel == 0 || (gapless && extent == numel), name, " must fill its memory without a gap");
}

template <class T>
const T* flat_in(const OpScope& op, const Tensor& tensor, const char* name, const Tensor& like,
                 const torch::stable::Device& device) {
  check_flat<T>(op, tensor, name, like, device);
  auto* pointer = static_cast<const T*>(tensor.const_data_ptr());
#if defined(PYOPS_EMULATOR)
  emulator::register_range(pointer, size_t(tensor.numel()) * sizeof(T), false, name);
#endif
  return pointer;
}

template <class T>
T* flat_out(const OpScope& op, const Tensor& tensor, const char* name, const Tensor& like,
            const torch::stable::Device& device) {
  check_flat<T>(op, tensor, name, like, device);
  auto* pointer = static_cast<T*>(tensor.mutable_data_ptr());
#if defined(PYOPS_EMULATOR)
  emulator::register_range(pointer, size_t(tensor.numel()) * sizeof(T), true, name);
#endif
  return pointer;
}

}  // namespace pyops
