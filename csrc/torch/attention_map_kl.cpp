// attention_map_kl for CPU tensors.
#include "attention_map.h"

namespace kd {
namespace {

double row_weight_of(const MapCall& call, int64_t reduction) { return reduction == kBatchMean ? 1 / count_maps(call, false) : 1; }

std::tuple<Tensor, Tensor> attention_map_kl(const Tensor& student, const Tensor& teacher, std::optional<Tensor> mask, double temperature,
                                            int64_t head_reduction, int64_t reduction) {
  MapCall call = describe_maps(student, teacher, mask, head_reduction, temperature, true);
  AttentionMap& op = call.op;
  Tensor stats = new_tensor(student, {op.batch, op.maps, op.tokens, static_cast<int64_t>(kMapStats)}, ScalarType::Float);
  op.stats = static_cast<float*>(stats.mutable_data_ptr());
  if (reduction != kNone) return {new_scalar(student, run_map_forward(call) * row_weight_of(call, reduction)), stats};
  Tensor rows = head_reduction == kEachHead ? new_tensor(student, {op.batch, op.maps, op.tokens}, ScalarType::Float)
                                            : new_tensor(student, {op.batch, op.tokens}, ScalarType::Float);
  op.row_loss = static_cast<float*>(rows.mutable_data_ptr());
  run_map_forward(call);
  return {rows, stats};
}

Tensor attention_map_kl_backward(const Tensor& grad, const Tensor& student, const Tensor& teacher, std::optional<Tensor> mask,
                                 const Tensor& stats, double temperature, int64_t head_reduction, int64_t reduction) {
  MapCall call = describe_maps(student, teacher, mask, head_reduction, temperature, true);
  AttentionMap& op = call.op;
  STD_TORCH_CHECK(stats.scalar_type() == ScalarType::Float && stats.is_contiguous() &&
                      stats.numel() == op.batch * op.maps * op.tokens * kMapStats,
                  "stats must come from attention_map_kl");
  op.stats = static_cast<float*>(stats.mutable_data_ptr());
  if (reduction != kNone) {
    op.grad_weight = static_cast<float>(upstream_of(grad) * row_weight_of(call, reduction));
    return run_map_backward(call, student);
  }
  const int64_t last = grad.dim() - 1;
  STD_TORCH_CHECK(grad.scalar_type() == ScalarType::Float && last == (head_reduction == kEachHead ? 2 : 1) && grad.size(0) == op.batch &&
                      grad.size(last) == op.tokens && (last == 1 || grad.size(1) == op.maps),
                  "grad must be float32 with the shape of the loss");
  op.grad_weight = 1;
  op.row_weight = static_cast<const float*>(grad.const_data_ptr());
  op.row_weight_stride_batch = grad.stride(0);
  op.row_weight_stride_map = last == 1 ? 0 : grad.stride(1);
  op.row_weight_stride_token = grad.stride(last);
  return run_map_backward(call, student);
}

}  // namespace
}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("attention_map_kl", TORCH_BOX(&kd::attention_map_kl));
  m.impl("attention_map_kl_backward", TORCH_BOX(&kd::attention_map_kl_backward));
}
