// How a thread reads and writes a row of logits: in chunks of 8 classes, 16 bytes per memory instruction.
//
// A vocabulary is rarely a multiple of 8 (BERT's is 30522), so rows start anywhere. Chunks are laid on the 16-byte grid of
// memory, not on the row: chunk c covers classes [8c - pad, 8c - pad + 8), and classes outside the row read as -inf, which has
// probability 0 and changes nothing. Only the first and last chunk of a row, and rows that are strided or misaligned, load class
// by class.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "../ops/dtype.h"

namespace kd::cuda {

constexpr int kChunk = 8;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }

template <class T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) { return x; }
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }
template <>
__device__ inline __half from_float<__half>(float x) { return __float2half_rn(x); }

// 2^x in one instruction, within 2 ulp; a result under 2^-126 is 0.
__device__ inline float exp2_flush(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  float y = exp2f(x);
  return y < 0x1p-126f ? 0.f : y;
#endif
}

// 8 classes as they lie in memory: 16 bytes of bf16 or f16, 32 of f32.
template <class T>
struct alignas(16) Chunk {
  static constexpr int kVectors = kChunk * sizeof(T) / sizeof(uint4);
  T at[kChunk];

  __device__ uint4* vectors() { return reinterpret_cast<uint4*>(at); }
};

// How many classes before `data` the 8-class grid of memory begins: 0..7.
template <class T>
__device__ int grid_pad(const T* data) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(data) / sizeof(T) % kChunk);
}

template <class T>
__device__ bool on_grid(const T* data, int pad) {
  return (reinterpret_cast<uintptr_t>(data) - pad * sizeof(T)) % sizeof(uint4) == 0;
}

template <class T>
struct Row {
  const T* data;
  int64_t stride;
  int classes;
  bool vector;  // stride 1, and the chunks lie on 16-byte boundaries

  __device__ Row(const T* data, int64_t stride, int classes, int pad)
      : data(data), stride(stride), classes(classes), vector(stride == 1 && on_grid(data, pad)) {}

  __device__ Chunk<T> load(int first) const {
    Chunk<T> chunk;
    if (vector && first >= 0 && first + kChunk <= classes) {
      const uint4* source = reinterpret_cast<const uint4*>(data + first);
#pragma unroll
      for (int i = 0; i < Chunk<T>::kVectors; ++i) chunk.vectors()[i] = __ldg(source + i);
    } else {
#pragma unroll
      for (int k = 0; k < kChunk; ++k) {
        int j = first + k;
        chunk.at[k] = j >= 0 && j < classes ? data[j * stride] : from_float<T>(-INFINITY);
      }
    }
    return chunk;
  }
};

// Writes the classes of a chunk that lie inside the row; `vector` as in Row.
template <class T>
__device__ void store(T* data, int classes, bool vector, int first, const float (&x)[kChunk]) {
  if (vector && first >= 0 && first + kChunk <= classes) {
    Chunk<T> chunk;
#pragma unroll
    for (int k = 0; k < kChunk; ++k) chunk.at[k] = from_float<T>(x[k]);
    uint4* target = reinterpret_cast<uint4*>(data + first);
#pragma unroll
    for (int i = 0; i < Chunk<T>::kVectors; ++i) target[i] = chunk.vectors()[i];
  } else {
#pragma unroll
    for (int k = 0; k < kChunk; ++k) {
      int j = first + k;
      if (j >= 0 && j < classes) data[j] = from_float<T>(x[k]);
    }
  }
}

// Calls use(a zero of the element type).
template <class Use>
__device__ void with_type(DType dtype, Use use) {
  switch (dtype) {
    case DType::kF32: return use(0.f);
    case DType::kBF16: return use(__nv_bfloat16());
    case DType::kF16: return use(__half());
  }
}

// `left` or 8 values, whichever is less.
__device__ inline void load_values(const void* data, DType dtype, int64_t offset, int64_t stride, int left, float (&x)[kChunk]) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const Chunk<T> chunk = Row<T>(static_cast<const T*>(data) + offset, stride, left, 0).load(0);
#pragma unroll
    for (int k = 0; k < kChunk; ++k) x[k] = to_float(chunk.at[k]);
  });
}

// How many of a call's rows there are, where only the device knows: see QuantLinear.
__device__ inline int64_t rows_in_use(int64_t rows, const int32_t* in_use) { return in_use != nullptr && *in_use < rows ? *in_use : rows; }

}  // namespace kd::cuda
