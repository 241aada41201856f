// What the losses that compare hidden states token by token share: hidden_mse, hidden_cosine and moment_mse. One layer of the list is
// one entry; all layers share the mask and the token grid. hidden_cosine is this and nothing more.
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

struct HiddenLayer {
  StatesView student, teacher;
  int64_t features;    // of both
  int64_t first_item;  // work items are blocks of tokens, those of layer 0 first
  float grad_weight;   // what a token's gradient is multiplied by for an upstream gradient of 1
  void* grad_student;  // backward: contiguous [batch, tokens, features], of the student's dtype
};

struct HiddenLayers {
  const HiddenLayer* layers;
  int64_t num_layers, batch, tokens;
  const bool* mask;       // [batch, tokens] or null: all real
  double* partial;        // forward: one sum of the tokens' losses per item
  const float* upstream;  // backward: the upstream gradient
  bool past_cache;        // backward on the CPU: the gradients are too large to be still in a cache when somebody reads them
};

}  // namespace kd
