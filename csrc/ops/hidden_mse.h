// hidden_mse: all layers at once, or with a projection one after the other, each as a HiddenProjection.
#pragma once
#include "hidden.h"

namespace kd {

enum Normalize : int32_t { kNoNormalize = 0, kL2 = 1, kLayerNorm = 2 };

struct HiddenMse : HiddenLayers {
  Normalize normalize;
};

// One layer whose student goes through weight [d_t, d_s] and bias [d_t] first.
struct HiddenProjection {
  StatesView student, teacher;
  const void* weight;  // by element strides
  int64_t weight_stride_row, weight_stride_column;
  DType weight_dtype;
  const void* bias;  // or null
  int64_t bias_stride;
  DType bias_dtype;
  int64_t d_s, d_t, batch, tokens;
  const int64_t* real;  // [rows] which of the batch * tokens are real, in order
  int64_t rows;
  Normalize normalize;
  double* partial;       // one sum of squares per block of rows
  float* packed_weight;  // workspace: what packing the weight leaves for the rows, for all layers that share the weight
  float* packed_rows;    // workspace: what the rows leave for the weight's gradient

  // Gradients for an upstream gradient of 1, contiguous; all null: not wanted. grad_bias may be null on its own, and grad_student
  // where there is no token. Where `accumulate`, those of weight and bias are added to what an earlier layer has left.
  float grad_weight;    // d(loss) / d(sum of squares)
  float* grad_student;  // [batch, tokens, d_s]
  float* grad_matrix;   // [d_t, d_s]
  float* grad_bias;     // [d_t]
  bool accumulate;
};

}  // namespace kd
