// Rows of activations to signed 8-bit codes (quantize.h).
//
// Bytes are the limit: a row is read twice, the second time from the first-level cache, and a byte a column is written: 4096 x 768 in
// bf16 are 9.4 MB, 2 us at 4.8 TB/s. A row belongs to a warp, or to a block where it is long.
#include "group.h"
#include "launch.h"
#include "quant_linear.h"
#include "quantize.h"

namespace kd::cuda {
namespace {

constexpr int kRowThreads = 128, kMostLanes = 256, kColumnsPerLane = 32;

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

template <class T>
__global__ void __launch_bounds__(kMostLanes, 4) quantize(QuantLinear op, int lanes) {
  const QuantWeights& w = op.weights;
  const int64_t rows = rows_in_use(op.rows, op.in_use), first_row = int64_t(blockIdx.x) * (blockDim.x / lanes);
  if (first_row >= rows) return;
  const int64_t row = first_row + threadIdx.x / lanes;
  const int lane = threadIdx.x % lanes, step = lanes * kChunk;
  const bool exists = row < rows;  // lanes without a row run along, for the reductions
  const int64_t offset = exists ? row / op.x.inner * op.x.stride_outer + row % op.x.inner * op.x.stride_inner : 0;
  const int real = exists ? static_cast<int>(w.columns) : 0, depth = exists ? static_cast<int>(w.depth) : 0;
  const Row<T> x(static_cast<const T*>(op.x.data) + offset, op.x.stride_column, real, 0);

  int32_t largest[] = {0};
  for (int first = lane * kChunk; first < real; first += step) {
    float values[kChunk];
    columns(w, x, first, values);
    largest[0] = largest_bits(values, largest[0]);
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
      sum[0] += store_codes(op, row, first, quantizer, values);
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
