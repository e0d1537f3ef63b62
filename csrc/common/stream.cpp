#include "common/tensor.h"

#include <dlfcn.h>

namespace pyops::detail {
namespace {

using GetStream = AOTITorchError (*)(int32_t, void**);

// libtorch_cuda is loaded privately by torch and absent from CPU builds: ask the loaded copy, link nothing.
GetStream find_stream_getter() {
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  if (library == nullptr) return nullptr;
  return reinterpret_cast<GetStream>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
}

}  // namespace

void* current_cuda_stream(int32_t device) {
  static const GetStream get = find_stream_getter();
  if (get == nullptr) throw std::runtime_error("pyops: this build of torch has no CUDA support");
  void* stream = nullptr;
  if (get(device, &stream) != 0) throw std::runtime_error("pyops: torch has no current stream on this device");
  return stream;
}

}  // namespace pyops::detail
