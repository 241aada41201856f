// What an encoder does between its products: out = LayerNorm(x + residual), row by row.
#pragma once
#include <cstdint>

namespace kd {

struct NormalizeRows {
  const float *x, *residual;  // [rows, columns], contiguous, as out, which may be either
  int64_t rows, columns;
  const float *weight, *bias;  // [columns]
  float eps;
  float* out;
};

}  // namespace kd
