// relation_kl for CPU tensors: attention_kl whose queries and keys are the same re-split tensor, so one gradient takes both parts.
#include "attention.h"

namespace kd {
namespace {

AttentionCall describe(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& mask,
                       const std::optional<Tensor>& cu_seqlens, int64_t max_seqlen, int64_t num_heads) {
  AttentionCall call;
  Attention& op = call.op;
  op.q_s = op.k_s = split_heads(student, num_heads, "student");
  op.q_t = op.k_t = split_heads(teacher, num_heads, "teacher");
  op.heads = num_heads;
  STD_TORCH_CHECK(student.dim() == (cu_seqlens ? 2 : 3), "cu_seqlens goes with packed tokens [tokens, width]");
  STD_TORCH_CHECK(teacher.dim() == student.dim() && teacher.size(0) == student.size(0) &&
                      (student.dim() == 2 || teacher.size(1) == student.size(1)),
                  "student and teacher must agree in batch and tokens");
  describe_tokens(call, student, mask, cu_seqlens, max_seqlen);
  op.scale_s = 1 / __builtin_sqrtf(static_cast<float>(op.q_s.size));
  op.scale_t = 1 / __builtin_sqrtf(static_cast<float>(op.q_t.size));
  op.kind = MapLoss::kKl;
  return call;
}

void set_gradient(Attention& op, Tensor& grad) {
  op.grad_q = grad.mutable_data_ptr();
  op.grad_q_view = split_heads(grad, op.heads, "grad");
}

std::tuple<Tensor, Tensor, Tensor> relation_kl(const Tensor& student, const Tensor& teacher, std::optional<Tensor> mask,
                                               std::optional<Tensor> cu_seqlens, int64_t max_seqlen, int64_t num_heads,
                                               int64_t reduction, bool need_grad) {
  AttentionCall call = describe(student, teacher, mask, cu_seqlens, max_seqlen, num_heads);
  const bool keep = need_grad && reduction != kNone;
  Tensor grad = keep ? new_attention_gradient(call, student, ScalarType::Float) : empty_saved(student);
  if (keep) set_gradient(call.op, grad);
  Tensor loss = run_kl(call, student, reduction);
  return {loss, grad, empty_saved(student)};
}

Tensor relation_kl_backward(const Tensor& grad, const Tensor& student, const Tensor& teacher, std::optional<Tensor> mask,
                            std::optional<Tensor> cu_seqlens, const Tensor& grad_student, const Tensor&, int64_t max_seqlen,
                            int64_t num_heads, int64_t reduction) {
  if (reduction != kNone) return scale_gradient(grad, grad_student, student);
  AttentionCall call = describe(student, teacher, mask, cu_seqlens, max_seqlen, num_heads);
  Tensor out = new_attention_gradient(call, student, student.scalar_type());
  set_gradient(call.op, out);
  weigh_rows(call, grad);
  run_maps(call.op);
  return out;
}

}  // namespace
}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("relation_kl", TORCH_BOX(&kd::relation_kl));
  m.impl("relation_kl_backward", TORCH_BOX(&kd::relation_kl_backward));
}
