// Shared memory that a launch asks for, and reads of shared memory, which the tests watch: was it written, and is there a barrier between
// the read and other warps' writes. Stores need no name: the tests see what has changed.
#pragma once
#include <cuda_runtime.h>

namespace kd::cuda {

#ifdef __CUDACC__

__device__ inline char* dynamic_shared() {
  extern __shared__ uint4 words[];
  return reinterpret_cast<char*>(words);
}

template <class T>
__device__ T load_shared(const void* p) {
  return *static_cast<const T*>(p);
}

#else

using cuda_host::load_shared;

inline char* dynamic_shared() { return cuda_host::dynamic_shared; }

#endif

}  // namespace kd::cuda
