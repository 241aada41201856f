// Where the launchers of CUDA ops queue their kernels, and what their status means.
//
// The library links no CUDA part of torch, so that it builds and loads beside a CPU build. The one thing wanted from there, the
// current stream, is looked up when the first CUDA tensor arrives; torch's CUDA library is in the process by then.
#pragma once
#include <dlfcn.h>

#include "../cuda/status.h"
#include "common.h"

namespace kd {

inline void* current_stream(const Tensor& x) {
  using Get = AOTITorchError (*)(int32_t device, void** stream);
  static const auto get = [] {
    // Python opens torch privately: its symbols are found in the library that is loaded already, or globally in another program.
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<Get>(dlsym(torch_cuda ? torch_cuda : RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream"));
  }();
  STD_TORCH_CHECK(get, "kdkernels: this build of torch has no CUDA, there is no stream to run on");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(get(x.get_device_index(), &stream));
  return stream;
}

inline void check_status(int status, const char* op) {
  STD_TORCH_CHECK(status == 0, "kdkernels.", op, " on CUDA failed: ", cuda::status_text(status));
}

}  // namespace kd
