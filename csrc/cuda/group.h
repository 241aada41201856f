// Reductions over the threads that share a row: a power of two of neighbours in a warp, or the whole block.
//
// Every thread gets the result, and the order of the additions depends on the group's size alone: results are the same bits on
// every run. All threads of the block must call these together, those without a row too.
#pragma once
#include <cuda_runtime.h>

#include "shared.h"

namespace kd::cuda {

constexpr int kWarp = 32;
constexpr int kMaxWarps = 32;

struct Max {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

struct Sum {
  template <class T>
  __device__ T operator()(T a, T b) const { return a + b; }
};

constexpr int kMaxValues = 4;

// Where warps leave their share for the others: kMaxValues words of 8 bytes per warp.
template <class T>
using Shares = T[kMaxWarps];

__device__ inline void* shares() {
  __shared__ double words[kMaxValues * kMaxWarps];
  return words;
}

// values[i] <- reduction of values[i] over the group of `size` threads.
template <class Op, int N, class T>
__device__ void reduce(T (&values)[N], int size, Op op = {}) {
  const int width = size < kWarp ? size : kWarp;
  for (int distance = width / 2; distance > 0; distance /= 2) {
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] = op(values[i], __shfl_xor_sync(0xffffffffu, values[i], distance));
  }
  if (size <= kWarp) return;

  static_assert(N <= kMaxValues && sizeof(T) <= 8, "shares() is too small");
  auto of_warp = static_cast<Shares<T>*>(shares());
  if (threadIdx.x % kWarp == 0) {
#pragma unroll
    for (int i = 0; i < N; ++i) of_warp[i][threadIdx.x / kWarp] = values[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i) {
    values[i] = load_shared<T>(&of_warp[i][0]);
    for (int warp = 1; warp < size / kWarp; ++warp) values[i] = op(values[i], load_shared<T>(&of_warp[i][warp]));
  }
  __syncthreads();  // of_warp may be written again
}

}  // namespace kd::cuda
