// What ops with quantised linears inside share, on every device: from tensors to kd::QuantLinear, checked.
#pragma once
#include <vector>

#include "../core/gelu_curve.h"
#include "../core/packed.h"
#include "../ops/quant_linear.h"
#include "common.h"

namespace kd {

inline const uint8_t* bytes_of(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Byte && x.dim() == 1 && x.is_contiguous(), name, " must be a run of uint8");
  return static_cast<const uint8_t*>(x.const_data_ptr());
}

inline Packed packed_view(const Tensor& packed) {
  Packed view;
  const char* wrong = parse_packed(bytes_of(packed, "packed"), packed.numel(), view);
  STD_TORCH_CHECK(!wrong, wrong ? wrong : "");
  return view;
}

// Weights as the CPU's quant_prepare returned them.
inline void describe_weights(const Tensor& weight, QuantWeights& weights) {
  const uint8_t* prepared = bytes_of(weight, "weight");
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(prepared) % kPackedAlign == 0, "weight must be aligned as quant_prepare returned it");
  const char* wrong = cpu::quant_weights(prepared, weight.numel(), weights);
  STD_TORCH_CHECK(!wrong, wrong ? wrong : "");
}

inline void describe_bias(const Tensor& bias, QuantLinear& op) {
  STD_TORCH_CHECK(bias.dim() == 1 && bias.size(0) == op.weights.rows && bias.is_contiguous(), "bias must be contiguous [out_features]");
  op.bias = bias.const_data_ptr();
  op.bias_dtype = dtype_of(bias, "bias");
}

inline const float* curve_of(Activation activation) {
  struct Curve {
    float values[kGeluCurveFloats];
    explicit Curve(double (*function)(double)) { make_gelu_curve(function, values); }
  };
  static const Curve erf(half_erf), tanh(half_tanh);
  return activation == Activation::kGelu ? erf.values : activation == Activation::kGeluTanh ? tanh.values : nullptr;
}

inline void describe_activation(int64_t activation, QuantLinear& op) {
  STD_TORCH_CHECK(activation >= 0 && activation <= static_cast<int64_t>(Activation::kTanh), "activation is unknown");
  op.activation = static_cast<Activation>(activation);
  op.curve = curve_of(op.activation);
}

// [..., features] as rows: one, two or three dimensions.
inline RowsView rows_view(const Tensor& x, const char* name) {
  const int64_t dims = x.dim();
  STD_TORCH_CHECK(dims >= 1 && dims <= 3, name, " must have one to three dimensions");
  const int64_t inner = dims >= 2 ? x.size(dims - 2) : 1;
  return {x.const_data_ptr(),  inner > 0 ? inner : 1,  dims == 3 ? x.stride(0) : 0, dims >= 2 ? x.stride(dims - 2) : 0,
          x.stride(dims - 1), dtype_of(x, name)};
}

// The rest of a call whose weights are known; returns the shape of the output.
inline std::vector<int64_t> describe(QuantLinear& op, const Tensor& x, const std::optional<Tensor>& bias,
                                     const std::optional<Tensor>& residual, int64_t out_features, int64_t activation,
                                     double input_scale) {
  const QuantWeights& w = op.weights;
  op.x = rows_view(x, "x");
  op.out_dtype = op.x.dtype;
  STD_TORCH_CHECK(x.size(x.dim() - 1) == w.columns && w.rows == out_features, "x and out_features must be as the weight has them");
  op.rows = x.numel() / w.columns;
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = w.rows;
  if (bias) {
    describe_bias(*bias, op);
    STD_TORCH_CHECK(bias->device() == x.device(), "bias must be on the device of x");
  }
  if (residual) {
    op.residual = rows_view(*residual, "residual");
    STD_TORCH_CHECK(residual->dim() == x.dim() && residual->numel() == op.rows * w.rows && op.residual.inner == op.x.inner,
                    "residual must have the shape of the output");
    STD_TORCH_CHECK(residual->device() == x.device(), "residual must be on the device of x");
  }
  describe_activation(activation, op);
  op.static_scale = static_cast<float>(input_scale);
  return shape;
}

}  // namespace kd
