// quant_linear for CPU tensors: the packed format to panels, then rows of activations to 8 bits and panels to threads.
#include "quant_linear.h"

namespace kd {
namespace {

Tensor quant_prepare(const Tensor& packed) {
  const Packed view = packed_view(packed);
  Tensor out = new_tensor(packed, {cpu::quant_prepared_bytes(view)}, ScalarType::Byte);
  cpu::quant_prepare(view, static_cast<uint8_t*>(out.mutable_data_ptr()));
  return out;
}

Tensor quant_restore(const Tensor& prepared, const Tensor& header) {
  const uint8_t* begin = bytes_of(header, "header");
  Packed packed;
  const char* wrong = parse_packed_header(begin, header.numel(), packed);
  STD_TORCH_CHECK(!wrong, wrong ? wrong : "");
  QuantWeights weights;
  describe_weights(prepared, weights);
  STD_TORCH_CHECK(cpu::quant_prepared_from(packed, weights), "prepared must come from the packed weight that had this header");
  Tensor out = new_tensor(prepared, {packed_sections(begin, packed)}, ScalarType::Byte);
  uint8_t* blob = static_cast<uint8_t*>(out.mutable_data_ptr());
  std::memset(blob, 0, out.numel());
  std::memcpy(blob, begin, kPackedHeader);
  packed_sections(blob, packed);
  cpu::quant_restore(weights, packed);
  return out;
}

Tensor quant_linear(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, std::optional<Tensor> residual,
                    int64_t out_features, int64_t activation, bool quantize, double input_scale,
                    int64_t /*layout: the header of `weight` has it*/) {
  const cpu::Table& kernels = table();
  QuantLinear op{};
  describe_weights(weight, op.weights);
  const QuantWeights& w = op.weights;
  const std::vector<int64_t> shape = describe(op, x, bias, residual, out_features, activation, input_scale);
  Tensor out = new_tensor(x, shape, x.scalar_type());
  op.out = out.mutable_data_ptr();
  const int64_t items = cpu::quant_linear_items(op);
  op.together = cpu::quant_linear_together(op, torch::stable::get_num_threads());
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
            [&](int64_t item, float* scratch) { kernels.quantize_rows(op, item, scratch); }, cpu::kQuantizedTogether);
  run_items(items, kernels.quant_linear_scratch(op),
            [&](int64_t item, float* scratch) { kernels.quant_linear(op, item, scratch); }, op.together);
  return out;
}

}  // namespace
}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("quant_prepare", TORCH_BOX(&kd::quant_prepare));
  m.impl("quant_restore", TORCH_BOX(&kd::quant_restore));
  m.impl("quant_linear", TORCH_BOX(&kd::quant_linear));
}
