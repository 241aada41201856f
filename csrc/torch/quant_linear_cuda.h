// What CUDA ops with quantised linears inside share: prepared weights that the host can't read.
#pragma once
#include "../cuda/quant_linear.h"
#include "quant_linear.h"

namespace kd {

// Weights as CUDA's quant_prepare returned them, for x's device; shape and `layout` (PackedWeight.layout) say what lies where.
inline void describe_prepared(const Tensor& weight, int64_t out_features, int64_t columns, int64_t layout, const Tensor& x,
                              QuantWeights& weights) {
  STD_TORCH_CHECK(weight.device() == x.device(), "weight must be on the device of x");
  Packed scheme;
  const bool known = packed_scheme(layout, out_features, columns, scheme);
  STD_TORCH_CHECK(known && out_features > 0, "layout must be that of a PackedWeight");
  const uint8_t* prepared = bytes_of(weight, "weight");
  const int64_t bytes = cuda::quant_weights(cuda::quant_layout(scheme), prepared, weights);
  STD_TORCH_CHECK(bytes == weight.numel() && reinterpret_cast<uintptr_t>(prepared) % 16 == 0,
                  "weight must come from quant_prepare, for x's columns, out_features and layout");
}

}  // namespace kd
