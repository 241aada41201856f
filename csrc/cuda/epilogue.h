// What follows the sums of a quantised product, for every kernel that has some: scales, bias, activation, residual, and the output's type,
// where a thread has 8 neighbouring columns: 16-byte reads and writes.
#pragma once
#include <cmath>
#include <type_traits>

#include "../ops/quant_linear.h"
#include "row.h"

namespace kd::cuda {

__device__ inline float activate(float x, Activation activation) {
  switch (activation) {
    case Activation::kNone: return x;
    case Activation::kRelu: return x < 0.f ? 0.f : x;  // keeps NaN
    case Activation::kGelu: return 0.5f * x * (1.f + erff(x * 0.70710678118654752f));
    case Activation::kGeluTanh: return 0.5f * x * (1.f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
    case Activation::kTanh: return tanhf(x);
  }
  return x;
}

// The outputs of a row from `column` on; those behind the last are left out. Of integer sums zeros and scales are still to come, of
// float ones the scale of the row, if it has one.
template <class T>
__device__ void write_outputs(const QuantLinear& op, int64_t row, int64_t column, const T (&sums)[kChunk]) {
  const QuantWeights& w = op.weights;
  const int left = w.rows - column < kChunk ? static_cast<int>(w.rows - column) : kChunk;
  const float a_scale = op.a_scale != nullptr ? op.a_scale[row] : 1.f;
  const int32_t of_row = op.a_sums != nullptr ? op.a_sums[row * w.segments] : 0;
  float bias[kChunk] = {}, y[kChunk];
  if (op.bias != nullptr) load_values(op.bias, op.bias_dtype, column, 1, left, bias);
#pragma unroll
  for (int k = 0; k < kChunk; ++k) {
    float scaled;
    if constexpr (std::is_same<T, int32_t>::value) {
      const int32_t zeros = op.a_sums != nullptr ? w.zeros[column + k] * of_row : 0;
      scaled = static_cast<float>(sums[k] - zeros) * w.scales[column + k];
    } else {
      scaled = sums[k];
    }
    y[k] = activate(fmaf(scaled, a_scale, bias[k]), op.activation);
  }
  if (op.residual.data != nullptr) {
    const RowsView& r = op.residual;
    const int64_t offset = row / r.inner * r.stride_outer + row % r.inner * r.stride_inner + column * r.stride_column;
    float residual[kChunk];
    load_values(r.data, r.dtype, offset, r.stride_column, left, residual);
#pragma unroll
    for (int k = 0; k < kChunk; ++k) y[k] += residual[k];
  }
  with_type(op.x.dtype, [&](auto type) {
    using Out = decltype(type);
    Out* out = static_cast<Out*>(op.out) + row * w.rows + column;
    store(out, left, on_grid(out, 0), 0, y);
  });
}

}  // namespace kd::cuda
