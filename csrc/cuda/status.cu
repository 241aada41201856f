// What a launcher's status means, in the words of the CUDA runtime.
#include "status.h"

#include <cuda_runtime.h>

namespace kd::cuda {

const char* status_text(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }

}  // namespace kd::cuda
