// The torch side of the CUDA ops, csrc/torch/*_cuda.cpp, for CPU tensors: registered as the CPU's, in front of the kernels on the host. What
// torch's CUDA part supplies has stand-ins: the guard of the current device, and the stream, which is asked for under that guard alone.
#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>

#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(ns, key, m) _STABLE_TORCH_LIBRARY_IMPL(ns, CPU, m, C10_UID)

#include "../../csrc/torch/encoder_cuda.cpp"
#include "../../csrc/torch/kd_loss_cuda.cpp"
#include "../../csrc/torch/quant_linear_cuda.cpp"
#include "../../csrc/torch/varlen_attention_cuda.cpp"

namespace {

int guards = 0, streams_asked_for = 0;

}  // namespace

extern "C" {

AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  ++guards;
  *guard = reinterpret_cast<DeviceGuardHandle>(&guards);
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) {
  --guards;
  return AOTI_TORCH_SUCCESS;
}

// A launch on any stream but the one that was given last is an error of the host's.
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  if (guards == 0) return AOTI_TORCH_FAILURE;
  cuda_host::stream = reinterpret_cast<cudaStream_t>(static_cast<uintptr_t>(0x1000 + ++streams_asked_for));
  *stream = cuda_host::stream;
  return AOTI_TORCH_SUCCESS;
}

int host_streams_asked_for() { return streams_asked_for; }
int host_guards() { return guards; }

}  // extern "C"
