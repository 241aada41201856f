// quant_linear for CPU tensors: the packed format to panels, then rows of activations to 8 bits and panels to threads.
#include "quant_linear.h"

#include <vector>

namespace kd {
namespace {

Tensor quant_prepare(const Tensor& packed) {
  Packed view;
  const char* wrong = parse_packed(bytes_of(packed, "packed"), packed.numel(), view);
  STD_TORCH_CHECK(!wrong, wrong ? wrong : "");
  Tensor out = new_tensor(packed, {cpu::quant_prepared_bytes(view)}, ScalarType::Byte);
  cpu::quant_prepare(view, static_cast<uint8_t*>(out.mutable_data_ptr()));
  return out;
}

// [..., features] as rows: one, two or three dimensions.
RowsView rows_view(const Tensor& x, const char* name) {
  const int64_t dims = x.dim();
  STD_TORCH_CHECK(dims >= 1 && dims <= 3, name, " must have one to three dimensions");
  const int64_t inner = dims >= 2 ? x.size(dims - 2) : 1;
  return {x.const_data_ptr(),  inner > 0 ? inner : 1,  dims == 3 ? x.stride(0) : 0, dims >= 2 ? x.stride(dims - 2) : 0,
          x.stride(dims - 1), dtype_of(x, name)};
}

Tensor quant_linear(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, std::optional<Tensor> residual,
                    int64_t out_features, int64_t activation, bool quantize, double input_scale) {
  const cpu::Table& kernels = table();
  QuantLinear op{};
  describe_weights(weight, op.weights);
  const QuantWeights& w = op.weights;
  op.x = rows_view(x, "x");
  STD_TORCH_CHECK(x.size(x.dim() - 1) == w.columns && w.rows == out_features, "x and out_features must be as the weight has them");
  op.rows = x.numel() / w.columns;
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = w.rows;
  if (bias) describe_bias(*bias, op);
  if (residual) {
    op.residual = rows_view(*residual, "residual");
    STD_TORCH_CHECK(residual->dim() == x.dim() && residual->numel() == op.rows * w.rows && op.residual.inner == op.x.inner,
                    "residual must have the shape of the output");
  }
  describe_activation(activation, op);
  op.static_scale = static_cast<float>(input_scale);
  Tensor out = new_tensor(x, shape, x.scalar_type());
  op.out = out.mutable_data_ptr();
  const int64_t items = cpu::quant_linear_items(op);
  if (!quantize) {
    run_items(items, kernels.quant_linear_float_scratch(op),
              [&](int64_t item, float* scratch) { kernels.quant_linear_float(op, item, scratch); });
    return out;
  }
  Tensor codes = new_tensor(x, {cpu::quant_code_bytes(op)}, ScalarType::Byte);
  Tensor scales = new_tensor(x, {op.rows}, ScalarType::Float);
  Tensor sums = new_tensor(x, {w.zeros ? op.rows * w.segments : 0}, ScalarType::Int);
  op.a = static_cast<uint8_t*>(codes.mutable_data_ptr());
  op.a_scale = static_cast<float*>(scales.mutable_data_ptr());
  op.a_sums = w.zeros ? static_cast<int32_t*>(sums.mutable_data_ptr()) : nullptr;
  run_items((op.rows + cpu::kQuantizedRows - 1) / cpu::kQuantizedRows, w.depth,
            [&](int64_t item, float* scratch) { kernels.quantize_rows(op, item, scratch); });
  run_items(items, kernels.quant_linear_scratch(op),
            [&](int64_t item, float* scratch) { kernels.quant_linear(op, item, scratch); },
            cpu::quant_row_block(op) * cpu::kPanelRows * out.element_size());  // neighbours prefetch for one another
  return out;
}

}  // namespace
}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("quant_prepare", TORCH_BOX(&kd::quant_prepare));
  m.impl("quant_linear", TORCH_BOX(&kd::quant_linear));
}
