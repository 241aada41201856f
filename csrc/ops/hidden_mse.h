// hidden_mse: one layer of the list is one entry; all layers share the mask and the token grid.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace kd {

// [batch, tokens, features] by element strides.
struct StatesView {
  const void* data;
  int64_t stride_batch, stride_token, stride_feature;
  DType dtype;
};

enum Normalize : int32_t { kNoNormalize = 0, kL2 = 1, kLayerNorm = 2 };

struct HiddenLayer {
  StatesView student, teacher;
  int64_t features;    // of both
  int64_t first_item;  // work items are blocks of tokens, those of layer 0 first
  float grad_weight;   // d(loss) / d(sum of squares) for an upstream gradient of 1
  void* grad_student;  // backward: contiguous [batch, tokens, features], of the student's dtype
};

struct HiddenMse {
  const HiddenLayer* layers;
  int64_t num_layers, batch, tokens;
  const bool* mask;  // [batch, tokens] or null: all real
  Normalize normalize;
  double* partial;        // forward: one sum of squares per item
  const float* upstream;  // backward: the upstream gradient
};

}  // namespace kd
