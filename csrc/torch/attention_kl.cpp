// attention_kl for CPU tensors.
#include "attention.h"

namespace kd {
namespace {

Attention describe(const Tensor& q_s, const Tensor& k_s, const Tensor& q_t, const Tensor& k_t, const std::optional<Tensor>& mask,
                   double temperature, double scale_s, double scale_t) {
  return describe_attention(q_s, k_s, q_t, k_t, mask, scale_s / temperature, scale_t / temperature, MapLoss::kKl);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_kl(const Tensor& q_s, const Tensor& k_s, const Tensor& q_t, const Tensor& k_t,
                                                        std::optional<Tensor> mask, double temperature, double scale_s,
                                                        double scale_t, int64_t reduction, bool need_grad) {
  Attention op = describe(q_s, k_s, q_t, k_t, mask, temperature, scale_s, scale_t);
  const bool keep = need_grad && reduction != kNone;
  Tensor grad_q = keep ? new_gradient(q_s, ScalarType::Float) : empty_saved(q_s);
  Tensor grad_k = keep ? new_gradient(k_s, ScalarType::Float) : empty_saved(k_s);
  if (keep) set_gradients(op, grad_q, grad_k);
  Tensor loss = run_kl(op, q_s, reduction);
  return {loss, grad_q, grad_k, empty_saved(q_s)};
}

std::tuple<Tensor, Tensor> attention_kl_backward(const Tensor& grad, const Tensor& q_s, const Tensor& k_s, const Tensor& q_t,
                                                 const Tensor& k_t, std::optional<Tensor> mask, const Tensor& grad_q,
                                                 const Tensor& grad_k, const Tensor&, double temperature, double scale_s,
                                                 double scale_t, int64_t reduction) {
  if (reduction != kNone) return {scale_gradient(grad, grad_q, q_s), scale_gradient(grad, grad_k, k_s)};
  Attention op = describe(q_s, k_s, q_t, k_t, mask, temperature, scale_s, scale_t);
  Tensor out_q = new_gradient(q_s, q_s.scalar_type()), out_k = new_gradient(k_s, k_s.scalar_type());
  set_gradients(op, out_q, out_k);
  weigh_rows(op, grad);
  run_maps(op);
  return {out_q, out_k};
}

}  // namespace
}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("attention_kl", TORCH_BOX(&kd::attention_kl));
  m.impl("attention_kl_backward", TORCH_BOX(&kd::attention_kl_backward));
}
