// What GPUs have that these kernels run on: sm_75 (Turing) and newer. sm_80 brought cp.async, products of bf16, the larger products of
// one instruction and more than 64 KB of shared memory a block. mma.h hides the first three; the last is a kernel's to ask for.
#pragma once
#include <cuda_runtime.h>

namespace kd::cuda {

// Of the GPU that device code is compiled for. In a function of the host it says nothing.
#if defined(__CUDA_ARCH__)
constexpr bool kSm80 = __CUDA_ARCH__ >= 800;
#elif defined(CUDA_HOST_ARCH)  // the tests' CPU
constexpr bool kSm80 = CUDA_HOST_ARCH >= 800;
#else
constexpr bool kSm80 = true;
#endif

// Of the current device.
inline bool has_sm80() {
  int device = 0, major = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  return major >= 8;
}

}  // namespace kd::cuda
