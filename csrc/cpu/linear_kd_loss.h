// What linear_kd_loss runs on the CPU beside matrix products and kd_loss's rows.
#pragma once
#include <cstdint>

#include "../ops/dtype.h"

namespace kd::cpu {

// out[i] = sum over rows of x[row * stride + i], i < columns, in the order of rows; added to what `out` holds where `keep`.
struct AddRows {
  const void* x;
  DType dtype;
  int64_t rows, stride, columns;
  float* out;
  bool keep;
};

}  // namespace kd::cpu
