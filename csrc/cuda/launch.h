// A kernel launch as a plain function call: <<<>>> is not C++, and the tests compile these sources for the CPU too.
#pragma once
#include <cuda_runtime.h>

namespace kd::cuda {

template <class... P>
int launch(void (*kernel)(P...), unsigned blocks, unsigned threads, void* stream, P... args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, kernel, args...);
}

}  // namespace kd::cuda
