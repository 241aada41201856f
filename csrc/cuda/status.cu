// What a launcher's status means, in the words of the CUDA runtime.
#include "status.h"

#include <cuda_runtime.h>

namespace kd::cuda {

const char* status_text(int status) {
  if (status == cudaErrorNoKernelImageForDevice) {
    return "the library was not built for this GPU; kdkernels doctor says for which, and from sm_75 (Turing) on any can be";
  }
  return cudaGetErrorString(static_cast<cudaError_t>(status));
}

}  // namespace kd::cuda
