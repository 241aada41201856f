// attention_mse for CPU tensors, on scores and on probabilities.
#include "attention.h"

namespace kd {
namespace {

// Real (head, i, j) of all batches.
double count_pairs(const Attention& op) {
  double pairs = 0;
  for (int64_t b = 0; b < op.batch; ++b) {
    const double real = static_cast<double>(count_real(op.mask ? op.mask + b * op.tokens : nullptr, op.tokens));
    pairs += real * real;
  }
  return pairs * static_cast<double>(op.heads);
}

Attention describe(const Tensor& q_s, const Tensor& k_s, const Tensor& q_t, const Tensor& k_t, const std::optional<Tensor>& mask,
                   int64_t on, double scale_s, double scale_t) {
  Attention op = describe_attention(q_s, k_s, q_t, k_t, mask, scale_s, scale_t, on == 0 ? MapLoss::kMseScores : MapLoss::kMseProbs);
  op.grad_weight = static_cast<float>(1 / std::max(count_pairs(op), 1.0));
  return op;
}

// The loss, from the items' sums in their order, whoever computed them.
template <typename F>
Tensor run_items_to_loss(Attention& op, const Tensor& like, int64_t workspace, const F& kernel) {
  std::vector<double> losses(op.batch * op.heads);
  op.item_loss = losses.data();
  run_items(static_cast<int64_t>(losses.size()), workspace, [&](int64_t item, float* scratch) { kernel(op, item, scratch); });
  double total = 0;
  for (double loss : losses) total += loss;
  return new_scalar(like, total / std::max(count_pairs(op), 1.0));
}

// On probabilities forward leaves the gradients; on scores it leaves Gram matrices, which do not grow with the tokens.
std::tuple<Tensor, Tensor, Tensor, Tensor> attention_mse(const Tensor& q_s, const Tensor& k_s, const Tensor& q_t, const Tensor& k_t,
                                                         std::optional<Tensor> mask, int64_t on, double scale_s, double scale_t,
                                                         bool need_grad) {
  Attention op = describe(q_s, k_s, q_t, k_t, mask, on, scale_s, scale_t);
  const cpu::Table& kernels = table();
  if (op.kind == MapLoss::kMseScores) {
    Tensor gram = empty_saved(q_s);
    if (need_grad) {
      gram = new_tensor(q_s, {2, op.batch, op.heads, op.q_s.size + op.q_t.size, op.q_s.size}, ScalarType::Double);
      op.gram = static_cast<double*>(gram.mutable_data_ptr());
    }
    Tensor loss = run_items_to_loss(op, q_s, kernels.attention_scores_scratch(op), kernels.attention_scores);
    return {loss, empty_saved(q_s), empty_saved(q_s), gram};
  }
  Tensor grad_q = need_grad ? new_gradient(q_s, ScalarType::Float) : empty_saved(q_s);
  Tensor grad_k = need_grad ? new_gradient(k_s, ScalarType::Float) : empty_saved(k_s);
  if (need_grad) set_gradients(op, grad_q, grad_k);
  Tensor loss = run_items_to_loss(op, q_s, kernels.attention_scratch(op), kernels.attention_maps);
  return {loss, grad_q, grad_k, empty_saved(q_s)};
}

std::tuple<Tensor, Tensor> attention_mse_backward(const Tensor& grad, const Tensor& q_s, const Tensor& k_s, const Tensor& q_t,
                                                  const Tensor& k_t, std::optional<Tensor> mask, const Tensor& grad_q,
                                                  const Tensor& grad_k, const Tensor& gram, int64_t on, double scale_s,
                                                  double scale_t) {
  if (on != 0) return {scale_gradient(grad, grad_q, q_s), scale_gradient(grad, grad_k, k_s)};
  Attention op = describe(q_s, k_s, q_t, k_t, mask, on, scale_s, scale_t);
  STD_TORCH_CHECK(gram.scalar_type() == ScalarType::Double && gram.is_contiguous() &&
                      gram.numel() == 2 * op.batch * op.heads * (op.q_s.size + op.q_t.size) * op.q_s.size,
                  "stats must come from attention_mse");
  op.gram = static_cast<double*>(gram.mutable_data_ptr());
  op.grad_weight *= upstream_of(grad);
  Tensor out_q = new_gradient(q_s, q_s.scalar_type()), out_k = new_gradient(k_s, k_s.scalar_type());
  set_gradients(op, out_q, out_k);
  const cpu::Table& kernels = table();
  run_items(op.batch * op.heads, kernels.attention_scores_scratch(op),
            [&](int64_t item, float* scratch) { kernels.attention_scores_backward(op, item, scratch); });
  return {out_q, out_k};
}

}  // namespace
}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("attention_mse", TORCH_BOX(&kd::attention_mse));
  m.impl("attention_mse_backward", TORCH_BOX(&kd::attention_mse_backward));
}
