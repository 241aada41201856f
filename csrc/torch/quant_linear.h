// What ops with quantised linears inside share: a weight and a bias as the kernels read them, checked.
#pragma once
#include "../core/gelu_curve.h"
#include "common.h"

namespace kd {

inline const uint8_t* bytes_of(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Byte && x.dim() == 1 && x.is_contiguous(), name, " must be a run of uint8");
  return static_cast<const uint8_t*>(x.const_data_ptr());
}

// Weights as quant_prepare returned them.
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

}  // namespace kd
