// What the attention losses share on the torch side: tensors to kd::Attention, row losses to a scalar, gradients out.
#pragma once
#include <algorithm>
#include <vector>

#include "common.h"

namespace kd {

inline HeadsView heads_view(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() == 4, name, " must be [batch, heads, tokens, d]");
  return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2), x.stride(3), x.size(3), dtype_of(x, name)};
}

// [batch, tokens, heads * d] seen as [batch, heads, tokens, d].
inline HeadsView split_heads(const Tensor& x, int64_t heads, const char* name) {
  STD_TORCH_CHECK(x.dim() == 3 && heads > 0 && x.size(2) % heads == 0, name, " must be [batch, tokens, num_heads * d]");
  const int64_t d = x.size(2) / heads;
  return {x.const_data_ptr(), x.stride(0), d * x.stride(2), x.stride(1), x.stride(2), d, dtype_of(x, name)};
}

inline Attention describe_attention(const Tensor& q_s, const Tensor& k_s, const Tensor& q_t, const Tensor& k_t,
                                    const std::optional<Tensor>& mask, double scale_s, double scale_t, MapLoss kind) {
  Attention op{};
  op.q_s = heads_view(q_s, "q_s");
  op.k_s = heads_view(k_s, "k_s");
  op.q_t = heads_view(q_t, "q_t");
  op.k_t = heads_view(k_t, "k_t");
  op.batch = q_s.size(0);
  op.heads = q_s.size(1);
  op.tokens = q_s.size(2);
  for (const Tensor* x : {&k_s, &q_t, &k_t})
    STD_TORCH_CHECK(x->size(0) == op.batch && x->size(1) == op.heads && x->size(2) == op.tokens,
                    "queries and keys must agree in batch, heads and tokens");
  STD_TORCH_CHECK(op.q_s.size == op.k_s.size && op.q_t.size == op.k_t.size, "queries and keys must agree in head size");
  op.mask = mask_of(mask, op.batch * op.tokens);
  op.scale_s = static_cast<float>(scale_s);
  op.scale_t = static_cast<float>(scale_t);
  op.kind = kind;
  return op;
}

// Where the gradients of queries and keys go.
inline void set_gradients(Attention& op, Tensor& grad_q, Tensor& grad_k) {
  op.grad_q = grad_q.mutable_data_ptr();
  op.grad_k = grad_k.mutable_data_ptr();
  op.grad_q_view = heads_view(grad_q, "grad_q");
  op.grad_k_view = heads_view(grad_k, "grad_k");
}

inline void run_maps(const Attention& op) {
  const cpu::Table& kernels = table();
  run_items(op.batch * op.heads, kernels.attention_scratch(op), [&](int64_t item, float* scratch) { kernels.attention_maps(op, item, scratch); });
}

// Sum of row losses in row order, so that it depends on nothing but the rows.
inline double sum_rows(const float* rows, int64_t n) {
  double total = 0;
  for (int64_t i = 0; i < n; ++i) total += rows[i];
  return total;
}

inline Tensor empty_saved(const Tensor& like) { return torch::stable::new_empty(like, {0}, ScalarType::Float); }

// The forward pass of the row losses (attention_kl, relation_kl). op.grad_weight and row_loss are filled in here.
inline Tensor run_kl(Attention& op, const Tensor& like, int64_t reduction) {
  const int64_t rows = op.batch * op.heads * op.tokens;
  const int64_t real = op.heads * count_real(op.mask, op.batch * op.tokens);
  const float weight = reduction == kBatchMean ? 1.0f / static_cast<float>(std::max<int64_t>(real, 1)) : 1.0f;
  op.grad_weight = weight;
  Tensor row_loss = torch::stable::new_empty(like, {op.batch, op.heads, op.tokens}, ScalarType::Float);
  op.row_loss = static_cast<float*>(row_loss.mutable_data_ptr());
  run_maps(op);
  return reduction == kNone ? row_loss : new_scalar(like, sum_rows(op.row_loss, rows) * weight);
}

// For backward of reduction "none": every row has its own upstream gradient, so the maps are made again.
inline void weigh_rows(Attention& op, const Tensor& grad) {
  STD_TORCH_CHECK(grad.scalar_type() == ScalarType::Float && grad.dim() == 3 && grad.size(0) == op.batch && grad.size(1) == op.heads &&
                      grad.size(2) == op.tokens,
                  "grad must be float32 with the shape of the loss");
  op.row_weight = static_cast<const float*>(grad.const_data_ptr());
  op.row_weight_stride_batch = grad.stride(0);
  op.row_weight_stride_head = grad.stride(1);
  op.row_weight_stride_token = grad.stride(2);
  op.grad_weight = 1;
}

}  // namespace kd
