// Rows of activations to signed 8-bit codes: q = round(x / scale), |q| <= 127, scale = max|x| / 127 of the row, or one that is given.
//
// Bytes are the limit: a row is read twice, the second time from the first-level cache, and a byte a column is written: 4096 x 768 in
// bf16 are 9.4 MB, 2 us at 4.8 TB/s. A row belongs to a warp, or to a block where it is long.
//
// What is not finite behaves as on the CPU: a row that holds NaN gets the scale NaN, one that holds Inf the scale Inf and codes of +-127
// where x is infinite, 0 elsewhere. The scale never falls below the smallest normal number, so 1 / scale is finite.
#include <cfloat>
#include <cstring>

#include "group.h"
#include "launch.h"
#include "quant_linear.h"
#include "row.h"

namespace kd::cuda {
namespace {

constexpr int kRowThreads = 128, kMostLanes = 256, kColumnsPerLane = 32;
constexpr int32_t kInfinityBits = 0x7f800000;

struct MaxBits {
  __device__ int32_t operator()(int32_t a, int32_t b) const { return a > b ? a : b; }
};

// As integers magnitudes are ordered as the floats are, with NaN above Inf above all numbers.
__device__ int32_t magnitude_bits(float x) {
  int32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits & 0x7fffffff;
}

__device__ float from_bits(int32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// The 8 columns from `first` on, times the weights' scales of columns; 0 behind the last.
template <class T>
__device__ void columns(const QuantWeights& w, const Row<T>& row, int first, float (&x)[kChunk]) {
  const Chunk<T> chunk = row.load(first);
#pragma unroll
  for (int k = 0; k < kChunk; ++k) {
    const bool inside = first + k < row.classes;
    x[k] = inside ? to_float(chunk.at[k]) : 0.f;
    if (inside && w.column_scales != nullptr) x[k] *= w.column_scales[first + k];
  }
}

struct Quantizer {
  float scale, inverse;
  bool infinite;

  __device__ Quantizer(int32_t largest_bits, float static_scale) : infinite(largest_bits == kInfinityBits) {
    scale = static_scale > 0.f && largest_bits < kInfinityBits ? static_scale : from_bits(largest_bits) / 127.f;
    if (scale < FLT_MIN) scale = FLT_MIN;
    inverse = 1.f / scale;
  }

  __device__ int8_t operator()(float x) const {
    if (infinite) return static_cast<int8_t>(x == INFINITY ? 127 : x == -INFINITY ? -127 : 0);
    return static_cast<int8_t>(rintf(fminf(fmaxf(x * inverse, -127.f), 127.f)));
  }
};

struct alignas(8) Codes {
  int8_t at[kChunk];
};

template <class T>
__global__ void __launch_bounds__(kMostLanes, 4) quantize(QuantLinear op, int lanes) {
  const QuantWeights& w = op.weights;
  const int64_t row = int64_t(blockIdx.x) * (blockDim.x / lanes) + threadIdx.x / lanes;
  const int lane = threadIdx.x % lanes, step = lanes * kChunk;
  const bool exists = row < op.rows;  // lanes without a row run along, for the reductions
  const int64_t offset = exists ? row / op.x.inner * op.x.stride_outer + row % op.x.inner * op.x.stride_inner : 0;
  const int real = exists ? static_cast<int>(w.columns) : 0, depth = exists ? static_cast<int>(w.depth) : 0;
  const Row<T> x(static_cast<const T*>(op.x.data) + offset, op.x.stride_column, real, 0);

  int32_t largest[] = {0};
  for (int first = lane * kChunk; first < real; first += step) {
    float values[kChunk];
    columns(w, x, first, values);
#pragma unroll
    for (int k = 0; k < kChunk; ++k) largest[0] = MaxBits()(largest[0], magnitude_bits(values[k]));
  }
  reduce<MaxBits>(largest, lanes);
  const Quantizer quantizer(largest[0], op.static_scale);
  if (exists && lane == 0) op.a_scale[row] = quantizer.scale;

  for (int segment = 0; segment < w.segments; ++segment) {
    const bool last = segment + 1 == w.segments;
    const int end = last || !exists ? depth : static_cast<int>((segment + 1) * w.segment);
    int32_t sum[] = {0};
    for (int first = static_cast<int>(segment * w.segment) + lane * kChunk; first < end; first += step) {
      float values[kChunk];
      columns(w, x, first, values);
      Codes codes;
#pragma unroll
      for (int k = 0; k < kChunk; ++k) {
        codes.at[k] = quantizer(values[k]);
        if (op.a_sums != nullptr) sum[0] += codes.at[k] * w.column_zeros[first + k];
      }
      *reinterpret_cast<Codes*>(op.a + row * w.depth + first) = codes;
    }
    if (op.a_sums == nullptr) continue;
    reduce<Sum>(sum, lanes);
    if (exists && lane == 0) op.a_sums[row * w.segments + segment] = sum[0];
  }
}

}  // namespace

int quantize_rows(const QuantLinear& op, void* stream) {
  if (op.rows == 0) return cudaSuccess;
  int lanes = kWarp;
  while (lanes < kMostLanes && lanes * kColumnsPerLane < op.weights.columns) lanes *= 2;
  const int threads = lanes == kWarp ? kRowThreads : lanes, rows = threads / lanes;
  const int64_t blocks = (op.rows + rows - 1) / rows;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  switch (op.x.dtype) {
    case DType::kF32: return launch(quantize<float>, blocks, threads, stream, op, lanes);
    case DType::kBF16: return launch(quantize<__nv_bfloat16>, blocks, threads, stream, op, lanes);
    case DType::kF16: return launch(quantize<__half>, blocks, threads, stream, op, lanes);
  }
  return cudaErrorInvalidValue;
}

}  // namespace kd::cuda
