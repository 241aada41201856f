// quant_linear for CUDA tensors: rows of activations to 8 bits, unless the weight is alone, then products, on torch's current stream; of
// many rows with a weight alone torch's.
// Preparing a weight is the host's work and waits for the device, once, when a weight is loaded.
#include "quant_linear_cuda.h"
#include "stream.h"

namespace kd {
namespace {

Tensor quant_prepare(const Tensor& packed) {
  const Tensor on_host = torch::stable::to(packed, torch::stable::Device(torch::headeronly::DeviceType::CPU));
  const Packed view = packed_view(on_host);
  QuantWeights weights;
  Tensor prepared = new_empty(on_host, {cuda::quant_weights(cuda::quant_layout(view), nullptr, weights)}, ScalarType::Byte);
  cuda::quant_prepare(view, static_cast<uint8_t*>(prepared.mutable_data_ptr()));
  return torch::stable::to(prepared, packed.device());
}

Tensor quant_linear(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, std::optional<Tensor> residual,
                    int64_t out_features, int64_t activation, bool quantize, double input_scale, int64_t layout) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  STD_TORCH_CHECK(x.dim() >= 1, "x must have one to three dimensions");
  QuantLinear op{};
  describe_prepared(weight, out_features, x.size(x.dim() - 1), layout, x, op.weights);
  const QuantWeights& w = op.weights;
  const std::vector<int64_t> shape = describe(op, x, bias, residual, out_features, activation, input_scale);
  Tensor out = new_empty(x, shape, x.scalar_type());
  op.out = out.mutable_data_ptr();
  void* stream = current_stream(x);
  Tensor codes = new_empty(x, {quantize ? op.rows : 0, w.depth}, ScalarType::Char);
  Tensor scales = new_empty(x, {quantize ? op.rows : 0}, ScalarType::Float);
  Tensor sums = new_empty(x, {quantize && w.zeros ? op.rows * w.segments : 0}, ScalarType::Int);
  if (quantize) {
    op.a = static_cast<uint8_t*>(codes.mutable_data_ptr());
    op.a_scale = static_cast<float*>(scales.mutable_data_ptr());
    op.a_sums = w.zeros ? static_cast<int32_t*>(sums.mutable_data_ptr()) : nullptr;
    check_status(cuda::quantize_rows(op, stream), "quant_linear");
  }
  if (!quantize && cuda::quant_unpack_serves(op)) {
    Tensor unpacked = new_empty(x, {w.rows, w.columns}, x.scalar_type());
    check_status(cuda::quant_unpack(w, op.x.dtype, unpacked.mutable_data_ptr(), stream), "quant_linear");
    const Tensor product = torch::stable::matmul(x, torch::stable::transpose(unpacked, 0, 1));
    check_status(cuda::quant_finish(op, product.const_data_ptr(), stream), "quant_linear");
    return out;
  }
  if (!cuda::quant_few_rows_serves(op, quantize)) {
    check_status(cuda::quant_linear(op, stream), "quant_linear");
    return out;
  }
  Tensor of_splits = new_empty(x, {cuda::quant_few_rows_bytes(op, quantize)}, ScalarType::Byte);
  check_status(cuda::quant_few_rows(op, quantize, static_cast<float*>(of_splits.mutable_data_ptr()), stream), "quant_linear");
  return out;
}

}  // namespace
}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CUDA, m) {
  m.impl("quant_prepare", TORCH_BOX(&kd::quant_prepare));
  m.impl("quant_linear", TORCH_BOX(&kd::quant_linear));
}
