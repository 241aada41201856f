// attention_kl for CPU tensors.
#include "attention.h"

namespace kd {
namespace {

constexpr int64_t kHeadMean = 2;

// Heads of the loss that share one head of k.
int64_t group_of(const Tensor& q, const Tensor& k, const char* name) {
  const int64_t heads = q.size(1), shared = k.size(1);
  STD_TORCH_CHECK(shared > 0 && heads > 0 && heads % shared == 0, name, " must have a number of heads that divides its queries'");
  return heads / shared;
}

BiasView bias_view(const AttentionCall& call, const std::optional<Tensor>& bias, int64_t heads, int64_t max_seqlen, const char* name) {
  if (!bias) return {};
  const int64_t tokens = call.packed() ? max_seqlen : call.op.tokens;
  STD_TORCH_CHECK(bias->dim() == 4 && bias->size(0) == call.op.batch && bias->size(1) == heads && bias->size(2) == tokens &&
                      bias->size(3) == tokens,
                  name, " must be [batch, heads, tokens, tokens]");
  return {bias->const_data_ptr(), bias->stride(0), bias->stride(1), bias->stride(2), bias->stride(3), dtype_of(*bias, name), 1, 1};
}

// Scores summed over heads are products of rows that hold all heads.
void join_heads(HeadsView& q, HeadsView& k, BiasView& bias, int64_t heads) {
  for (HeadsView* x : {&q, &k}) {
    x->joined = heads;
    x->size *= heads;
  }
  bias.joined = heads;
}

AttentionCall describe(const Tensor& q_s, const Tensor& k_s, const Tensor& q_t, const Tensor& k_t, const std::optional<Tensor>& mask,
                       const std::optional<Tensor>& cu_seqlens, const std::optional<Tensor>& bias_s, const std::optional<Tensor>& bias_t,
                       const std::optional<Tensor>& lse_s, const std::optional<Tensor>& lse_t, int64_t max_seqlen, double temperature,
                       double scale_s, double scale_t, int64_t kind, int64_t head_reduction, const std::vector<int64_t>& head_map,
                       bool causal) {
  STD_TORCH_CHECK(kind == kKl || kind == kReverseKl, "kind must be kl or reverse_kl");
  const int64_t heads_s = q_s.size(1), heads_t = q_t.size(1);
  const bool mean = head_reduction == kHeadMean;
  AttentionCall call = describe_attention(q_s, k_s, q_t, k_t, mask, cu_seqlens, max_seqlen, scale_s / temperature / (mean ? heads_s : 1),
                                          scale_t / temperature / (mean ? heads_t : 1), kind == kKl ? MapLoss::kKl : MapLoss::kReverseKl);
  Attention& op = call.op;
  op.causal = causal;
  op.k_s.group = group_of(q_s, k_s, "k_s");
  op.k_t.group = group_of(q_t, k_t, "k_t");
  op.bias_s = bias_view(call, bias_s, heads_s, max_seqlen, "bias_s");
  op.bias_t = bias_view(call, bias_t, heads_t, max_seqlen, "bias_t");
  op.bias_s.factor = static_cast<float>(1 / temperature / (mean ? heads_s : 1));
  op.bias_t.factor = static_cast<float>(1 / temperature / (mean ? heads_t : 1));
  if (head_reduction) {
    STD_TORCH_CHECK(head_map.empty() && !lse_s && !lse_t, "head_reduction goes with neither head_map nor lse_s and lse_t");
    join_heads(op.q_s, op.k_s, op.bias_s, heads_s);
    join_heads(op.q_t, op.k_t, op.bias_t, heads_t);
    op.heads = 1;
    return call;
  }
  op.group = op.k_s.group;
  STD_TORCH_CHECK(static_cast<int64_t>(head_map.size()) == heads_s || (head_map.empty() && heads_s == heads_t),
                  "head_map must name a head of the teacher for each of the student's ", heads_s);
  for (int64_t head : head_map)
    STD_TORCH_CHECK(head >= 0 && head < heads_t, "head_map must name heads of the teacher in [0, ", heads_t, "), got ", head);
  call.head_map = head_map;
  op.head_map = head_map.empty() ? nullptr : call.head_map.data();
  if (lse_s) op.lse_s = rows_view(call, *lse_s, heads_s, "lse_s");
  if (lse_t) op.lse_t = rows_view(call, *lse_t, heads_t, "lse_t");
  return call;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_kl(
    const Tensor& q_s, const Tensor& k_s, const Tensor& q_t, const Tensor& k_t, std::optional<Tensor> mask,
    std::optional<Tensor> cu_seqlens, std::optional<Tensor> bias_s, std::optional<Tensor> bias_t, std::optional<Tensor> lse_s,
    std::optional<Tensor> lse_t, int64_t max_seqlen, double temperature, double scale_s, double scale_t, int64_t kind,
    int64_t head_reduction, std::vector<int64_t> head_map, bool causal, int64_t reduction, bool need_grad) {
  AttentionCall call = describe(q_s, k_s, q_t, k_t, mask, cu_seqlens, bias_s, bias_t, lse_s, lse_t, max_seqlen, temperature, scale_s,
                                scale_t, kind, head_reduction, head_map, causal);
  const bool keep = need_grad && reduction != kNone;
  Tensor grad_q = keep ? new_attention_gradient(call, q_s, ScalarType::Float) : empty_saved(q_s);
  Tensor grad_k = keep ? new_attention_gradient(call, k_s, ScalarType::Float) : empty_saved(k_s);
  if (keep) set_gradients(call.op, grad_q, grad_k);
  Tensor loss = run_kl(call, q_s, reduction);
  return {loss, grad_q, grad_k, empty_saved(q_s)};
}

std::tuple<Tensor, Tensor> attention_kl_backward(
    const Tensor& grad, const Tensor& q_s, const Tensor& k_s, const Tensor& q_t, const Tensor& k_t, std::optional<Tensor> mask,
    std::optional<Tensor> cu_seqlens, std::optional<Tensor> bias_s, std::optional<Tensor> bias_t, std::optional<Tensor> lse_s,
    std::optional<Tensor> lse_t, const Tensor& grad_q, const Tensor& grad_k, const Tensor&, int64_t max_seqlen, double temperature,
    double scale_s, double scale_t, int64_t kind, int64_t head_reduction, std::vector<int64_t> head_map, bool causal, int64_t reduction) {
  if (reduction != kNone) return {scale_gradient(grad, grad_q, q_s), scale_gradient(grad, grad_k, k_s)};
  AttentionCall call = describe(q_s, k_s, q_t, k_t, mask, cu_seqlens, bias_s, bias_t, lse_s, lse_t, max_seqlen, temperature, scale_s,
                                scale_t, kind, head_reduction, head_map, causal);
  Tensor out_q = new_attention_gradient(call, q_s, q_s.scalar_type()), out_k = new_attention_gradient(call, k_s, k_s.scalar_type());
  set_gradients(call.op, out_q, out_k);
  weigh_rows(call, grad);
  run_maps(call.op);
  return {out_q, out_k};
}

}  // namespace
}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("attention_kl", TORCH_BOX(&kd::attention_kl));
  m.impl("attention_kl_backward", TORCH_BOX(&kd::attention_kl_backward));
}
