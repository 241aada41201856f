// A kernel launch as a plain function call: <<<>>> is not C++, and the tests compile these sources for the CPU too.
#pragma once
#include <cuda_runtime.h>

#include <cstddef>

namespace kd::cuda {

// With `shared` bytes of dynamic shared memory; beyond 48 KB a kernel must have been allowed to have so much.
template <class... P>
int launch_shared(void (*kernel)(P...), unsigned blocks, unsigned threads, size_t shared, void* stream, P... args) {
  constexpr size_t kAllowed = 48 << 10;
  if (shared > kAllowed) {
    const auto status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (status != cudaSuccess) return status;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, kernel, args...);
}

template <class... P>
int launch(void (*kernel)(P...), unsigned blocks, unsigned threads, void* stream, P... args) {
  return launch_shared(kernel, blocks, threads, 0, stream, args...);
}

}  // namespace kd::cuda
