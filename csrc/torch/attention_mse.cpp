// attention_mse for CPU tensors, on scores and on probabilities.
#include "attention.h"

namespace kd {
namespace {

// Real (head, i, j) of all batches.
double count_pairs(const AttentionCall& call) {
  const Attention& op = call.op;
  double pairs = 0;
  for (int64_t b = 0; b < op.batch; ++b) {
    const bool* mask = op.mask ? op.mask + b * op.tokens : nullptr;
    const int64_t real = call.packed() ? call.cu_seqlens[b + 1] - call.cu_seqlens[b] : count_real(mask, op.tokens);
    pairs += static_cast<double>(real) * static_cast<double>(real);
  }
  return pairs * static_cast<double>(op.heads);
}

AttentionCall describe(const Tensor& q_s, const Tensor& k_s, const Tensor& q_t, const Tensor& k_t, const std::optional<Tensor>& mask,
                       const std::optional<Tensor>& cu_seqlens, int64_t max_seqlen, int64_t on, double scale_s, double scale_t) {
  AttentionCall call = describe_attention(q_s, k_s, q_t, k_t, mask, cu_seqlens, max_seqlen, scale_s, scale_t,
                                          on == 0 ? MapLoss::kMseScores : MapLoss::kMseProbs);
  for (const Tensor* x : {&k_s, &q_t, &k_t}) STD_TORCH_CHECK(x->size(1) == call.op.heads, "queries and keys must agree in heads");
  call.op.grad_weight = static_cast<float>(1 / std::max(count_pairs(call), 1.0));
  return call;
}

// The loss, from the items' sums in their order, whoever computed them.
template <typename F>
Tensor run_items_to_loss(AttentionCall& call, const Tensor& like, int64_t workspace, const F& kernel) {
  std::vector<double> losses(items_of(call.op));
  call.op.item_loss = losses.data();
  run_items(static_cast<int64_t>(losses.size()), workspace, [&](int64_t item, float* scratch) { kernel(call.op, item, scratch); });
  double total = 0;
  for (double loss : losses) total += loss;
  return new_scalar(like, total / std::max(count_pairs(call), 1.0));
}

// On probabilities forward leaves the gradients; on scores it leaves Gram matrices, which do not grow with the tokens.
std::tuple<Tensor, Tensor, Tensor, Tensor> attention_mse(const Tensor& q_s, const Tensor& k_s, const Tensor& q_t, const Tensor& k_t,
                                                         std::optional<Tensor> mask, std::optional<Tensor> cu_seqlens,
                                                         int64_t max_seqlen, int64_t on, double scale_s, double scale_t,
                                                         bool need_grad) {
  AttentionCall call = describe(q_s, k_s, q_t, k_t, mask, cu_seqlens, max_seqlen, on, scale_s, scale_t);
  Attention& op = call.op;
  const cpu::Table& kernels = table();
  if (op.kind == MapLoss::kMseScores) {
    Tensor gram = empty_saved(q_s);
    if (need_grad) {
      gram = new_tensor(q_s, {2, op.batch, op.heads, op.q_s.size + op.q_t.size, op.q_s.size}, ScalarType::Double);
      op.gram = static_cast<double*>(gram.mutable_data_ptr());
    }
    Tensor loss = run_items_to_loss(call, q_s, kernels.attention_scores_scratch(op), kernels.attention_scores);
    return {loss, empty_saved(q_s), empty_saved(q_s), gram};
  }
  Tensor grad_q = need_grad ? new_attention_gradient(call, q_s, ScalarType::Float) : empty_saved(q_s);
  Tensor grad_k = need_grad ? new_attention_gradient(call, k_s, ScalarType::Float) : empty_saved(k_s);
  if (need_grad) set_gradients(op, grad_q, grad_k);
  Tensor loss = run_items_to_loss(call, q_s, kernels.attention_scratch(op), kernels.attention_maps);
  return {loss, grad_q, grad_k, empty_saved(q_s)};
}

std::tuple<Tensor, Tensor> attention_mse_backward(const Tensor& grad, const Tensor& q_s, const Tensor& k_s, const Tensor& q_t,
                                                  const Tensor& k_t, std::optional<Tensor> mask, std::optional<Tensor> cu_seqlens,
                                                  const Tensor& grad_q, const Tensor& grad_k, const Tensor& gram, int64_t max_seqlen,
                                                  int64_t on, double scale_s, double scale_t) {
  if (on != 0) return {scale_gradient(grad, grad_q, q_s), scale_gradient(grad, grad_k, k_s)};
  AttentionCall call = describe(q_s, k_s, q_t, k_t, mask, cu_seqlens, max_seqlen, on, scale_s, scale_t);
  Attention& op = call.op;
  STD_TORCH_CHECK(gram.scalar_type() == ScalarType::Double && gram.is_contiguous() &&
                      gram.numel() == 2 * op.batch * op.heads * (op.q_s.size + op.q_t.size) * op.q_s.size,
                  "stats must come from attention_mse");
  op.gram = static_cast<double*>(gram.mutable_data_ptr());
  op.grad_weight *= upstream_of(grad);
  Tensor out_q = new_attention_gradient(call, q_s, q_s.scalar_type()), out_k = new_attention_gradient(call, k_s, k_s.scalar_type());
  set_gradients(op, out_q, out_k);
  const cpu::Table& kernels = table();
  run_items(items_of(op), kernels.attention_scores_scratch(op),
            [&](int64_t item, float* scratch) { kernels.attention_scores_backward(op, item, scratch); });
  return {out_q, out_k};
}

}  // namespace
}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("attention_mse", TORCH_BOX(&kd::attention_mse));
  m.impl("attention_mse_backward", TORCH_BOX(&kd::attention_mse_backward));
}
