// moment_mse: the layers of hidden.h, the weights of both terms, and what forward leaves for backward.
#pragma once
#include "hidden.h"

namespace kd {

enum VarianceLoss : int32_t { kAbsolute = 0, kSquared = 1 };

struct MomentMse : HiddenLayers {
  double mean_weight, variance_weight;
  VarianceLoss variance;
  // [num_layers, batch, tokens, 3], null: not wanted. Of a token: m, about its mean, a and b, where its gradient is a + b (s - m); 0 where
  // padded.
  float* stats;
};

}  // namespace kd
