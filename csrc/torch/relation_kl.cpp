// relation_kl for CPU tensors: attention_kl whose queries and keys are the same re-split tensor, so one gradient takes both parts.
#include "attention.h"

namespace kd {
namespace {

Attention describe(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& mask, int64_t num_heads) {
  Attention op{};
  op.q_s = op.k_s = split_heads(student, num_heads, "student");
  op.q_t = op.k_t = split_heads(teacher, num_heads, "teacher");
  op.batch = student.size(0);
  op.heads = num_heads;
  op.tokens = student.size(1);
  STD_TORCH_CHECK(teacher.size(0) == op.batch && teacher.size(1) == op.tokens, "student and teacher must agree in batch and tokens");
  op.mask = mask_of(mask, op.batch * op.tokens);
  op.scale_s = 1 / __builtin_sqrtf(static_cast<float>(op.q_s.size));
  op.scale_t = 1 / __builtin_sqrtf(static_cast<float>(op.q_t.size));
  op.kind = MapLoss::kKl;
  return op;
}

void set_gradient(Attention& op, Tensor& grad) {
  op.grad_q = grad.mutable_data_ptr();
  op.grad_q_view = split_heads(grad, op.heads, "grad");
}

std::tuple<Tensor, Tensor, Tensor> relation_kl(const Tensor& student, const Tensor& teacher, std::optional<Tensor> mask,
                                               int64_t num_heads, int64_t reduction, bool need_grad) {
  Attention op = describe(student, teacher, mask, num_heads);
  const bool keep = need_grad && reduction != kNone;
  Tensor grad = keep ? new_gradient(student, ScalarType::Float) : empty_saved(student);
  if (keep) set_gradient(op, grad);
  Tensor loss = run_kl(op, student, reduction);
  return {loss, grad, empty_saved(student)};
}

Tensor relation_kl_backward(const Tensor& grad, const Tensor& student, const Tensor& teacher, std::optional<Tensor> mask,
                            const Tensor& grad_student, const Tensor&, int64_t num_heads, int64_t reduction) {
  if (reduction != kNone) return scale_gradient(grad, grad_student, student);
  Attention op = describe(student, teacher, mask, num_heads);
  Tensor out = new_gradient(student, student.scalar_type());
  set_gradient(op, out);
  weigh_rows(op, grad);
  run_maps(op);
  return out;
}

}  // namespace
}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("relation_kl", TORCH_BOX(&kd::relation_kl));
  m.impl("relation_kl_backward", TORCH_BOX(&kd::relation_kl_backward));
}
