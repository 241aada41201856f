// A post-norm encoder block: a = LayerNorm(x + W_o attention(W_q x, W_k x, W_v x)), y = LayerNorm(a + W_down f(W_up a)).
#pragma once
#include <cstdint>

#include "dtype.h"
#include "quant_linear.h"

namespace kd {

// What is between its products: out = LayerNorm(x + residual), row by row.
struct NormalizeRows {
  const void *x, *residual;  // [rows, columns], contiguous, as out, which on the CPU may be either
  int64_t rows, columns;
  const void *weight, *bias;  // [columns]
  float eps;
  void* out;
  DType dtype, norm_dtype;  // of the rows; of weight and bias. float32 on the CPU, both
  const int32_t* in_use;    // as in QuantLinear
};

// Its parameters: weights, bias and activation of each linear layer; columns, weight, bias and eps of each norm.
struct EncoderBlock {
  QuantLinear qkv[3], output, up, down;
  NormalizeRows attention_norm, output_norm;
};

}  // namespace kd
