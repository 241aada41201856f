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

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_mse(const Tensor& q_s, const Tensor& k_s, const Tensor& q_t, const Tensor& k_t,
                                                         std::optional<Tensor> mask, int64_t on, double scale_s, double scale_t,
                                                         bool need_grad) {
  const bool scores = on == 0;
  Attention op = describe_attention(q_s, k_s, q_t, k_t, mask, scale_s, scale_t, scores ? MapLoss::kMseScores : MapLoss::kMseProbs);
  Tensor grad_q = need_grad ? new_gradient(q_s, ScalarType::Float) : empty_saved(q_s);
  Tensor grad_k = need_grad ? new_gradient(k_s, ScalarType::Float) : empty_saved(k_s);
  if (need_grad) set_gradients(op, grad_q, grad_k);
  const double weight = 1 / std::max(count_pairs(op), 1.0);
  op.grad_weight = static_cast<float>(weight);

  const int64_t items = op.batch * op.heads;
  std::vector<double> losses(items);
  op.item_loss = losses.data();
  const cpu::Table& kernels = table();
  const int64_t workspace = scores ? kernels.attention_scores_scratch(op) : kernels.attention_scratch(op);
  const auto kernel = scores ? kernels.attention_scores : kernels.attention_maps;
  run_items(items, workspace, [&](int64_t item, float* scratch) { kernel(op, item, scratch); });
  double total = 0;  // in the order of items, whoever computed them
  for (double loss : losses) total += loss;
  return {new_scalar(q_s, total * weight), grad_q, grad_k, empty_saved(q_s)};
}

std::tuple<Tensor, Tensor> attention_mse_backward(const Tensor& grad, const Tensor& q_s, const Tensor& k_s, const Tensor&, const Tensor&,
                                                  std::optional<Tensor>, const Tensor& grad_q, const Tensor& grad_k, const Tensor&,
                                                  int64_t, double, double) {
  return {scale_gradient(grad, grad_q, q_s), scale_gradient(grad, grad_k, k_s)};
}

}  // namespace
}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("attention_mse", TORCH_BOX(&kd::attention_mse));
  m.impl("attention_mse_backward", TORCH_BOX(&kd::attention_mse_backward));
}
