// What the attention losses share on the torch side: tensors to kd::Attention, row losses to a scalar, gradients out.
#pragma once
#include <algorithm>
#include <cstring>
#include <vector>

#include "common.h"

namespace kd {

// One call, and what its struct points to. Packed batches have the tokens of all sequences in one axis.
struct AttentionCall {
  Attention op{};
  std::vector<int64_t> cu_seqlens, head_map;
  int64_t total = 0;  // tokens of all sequences, padding included

  bool packed() const { return op.cu_seqlens; }
};

// [batch, heads, tokens, d], or packed [tokens, heads, d].
inline HeadsView heads_view(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() == 4 || x.dim() == 3, name, " must be [batch, heads, tokens, d] or packed [tokens, heads, d]");
  if (x.dim() == 3) return {x.const_data_ptr(), 0, x.stride(1), x.stride(0), x.stride(2), x.size(2), dtype_of(x, name)};
  return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2), x.stride(3), x.size(3), dtype_of(x, name)};
}

// [batch, tokens, heads * d] seen as [batch, heads, tokens, d]; packed: [tokens, heads * d].
inline HeadsView split_heads(const Tensor& x, int64_t heads, const char* name) {
  STD_TORCH_CHECK((x.dim() == 3 || x.dim() == 2) && heads > 0 && x.size(-1) % heads == 0, name,
                  " must be [batch, tokens, num_heads * d] or packed [tokens, num_heads * d]");
  const int64_t d = x.size(-1) / heads, feature = x.stride(-1);
  return {x.const_data_ptr(), x.dim() == 3 ? x.stride(0) : 0, d * feature, x.stride(-2), feature, d, dtype_of(x, name)};
}

// The bounds of packed sequences: int32 or int64, from 0, never falling, within `total`.
inline std::vector<int64_t> read_bounds(const Tensor& x, int64_t total, int64_t max_seqlen) {
  const bool wide = x.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK((wide || x.scalar_type() == ScalarType::Int) && x.dim() == 1 && x.size(0) > 0,
                  "cu_seqlens must be int32 or int64 [sequences + 1]");
  std::vector<int64_t> bounds(x.size(0));
  for (size_t i = 0; i < bounds.size(); ++i) {
    const int64_t at = static_cast<int64_t>(i) * x.stride(0);
    const void* data = x.const_data_ptr();
    bounds[i] = wide ? static_cast<const int64_t*>(data)[at] : static_cast<const int32_t*>(data)[at];
    const int64_t before = i ? bounds[i - 1] : 0;
    STD_TORCH_CHECK((i || bounds[i] == 0) && bounds[i] >= before && bounds[i] <= total,
                    "cu_seqlens must start at 0, never fall and end at ", total, " tokens at most; got ", bounds[i], " at position ", at);
    STD_TORCH_CHECK(bounds[i] - before <= max_seqlen, "max_seqlen is ", max_seqlen, ", but a sequence of cu_seqlens has ",
                    bounds[i] - before, " tokens");
  }
  return bounds;
}

// How many sequences there are and which of their tokens are real; x is the student's tensor, whose tokens lie in axis -2 or, packed, 0.
inline void describe_tokens(AttentionCall& call, const Tensor& x, const std::optional<Tensor>& mask,
                            const std::optional<Tensor>& cu_seqlens, int64_t max_seqlen) {
  Attention& op = call.op;
  if (!cu_seqlens) {
    op.batch = x.size(0);
    op.tokens = x.size(-2);
    call.total = op.batch * op.tokens;
    op.mask = mask_of(mask, call.total);
    return;
  }
  STD_TORCH_CHECK(!mask, "mask must be None where cu_seqlens is given");
  call.total = x.size(0);
  call.cu_seqlens = read_bounds(*cu_seqlens, call.total, max_seqlen);
  op.cu_seqlens = call.cu_seqlens.data();
  op.batch = static_cast<int64_t>(call.cu_seqlens.size()) - 1;
  for (int64_t b = 0; b < op.batch; ++b) op.tokens = std::max(op.tokens, op.cu_seqlens[b + 1] - op.cu_seqlens[b]);
}

inline AttentionCall describe_attention(const Tensor& q_s, const Tensor& k_s, const Tensor& q_t, const Tensor& k_t,
                                        const std::optional<Tensor>& mask, const std::optional<Tensor>& cu_seqlens, int64_t max_seqlen,
                                        double scale_s, double scale_t, MapLoss kind) {
  AttentionCall call;
  Attention& op = call.op;
  op.q_s = heads_view(q_s, "q_s");
  op.k_s = heads_view(k_s, "k_s");
  op.q_t = heads_view(q_t, "q_t");
  op.k_t = heads_view(k_t, "k_t");
  const int64_t dim = q_s.dim();
  STD_TORCH_CHECK(dim == (cu_seqlens ? 3 : 4), "cu_seqlens goes with packed queries and keys [tokens, heads, d]");
  op.heads = q_s.size(1);
  for (const Tensor* x : {&k_s, &q_t, &k_t})
    STD_TORCH_CHECK(x->dim() == dim && x->size(0) == q_s.size(0) && (dim == 3 || x->size(2) == q_s.size(2)),
                    "queries and keys must agree in batch and tokens");
  STD_TORCH_CHECK(op.q_s.size == op.k_s.size && op.q_t.size == op.k_t.size, "queries and keys must agree in head size");
  describe_tokens(call, q_s, mask, cu_seqlens, max_seqlen);
  op.scale_s = static_cast<float>(scale_s);
  op.scale_t = static_cast<float>(scale_t);
  op.kind = kind;
  return call;
}

// Where the gradients of queries and keys go; heads are shared and joined as in the queries and keys themselves.
inline void set_gradients(Attention& op, Tensor& grad_q, Tensor& grad_k) {
  op.grad_q = grad_q.mutable_data_ptr();
  op.grad_k = grad_k.mutable_data_ptr();
  const auto like = [](HeadsView view, const HeadsView& input) {
    view.size = input.size;
    view.joined = input.joined;
    view.group = input.group;
    return view;
  };
  op.grad_q_view = like(heads_view(grad_q, "grad_q"), op.q_s);
  op.grad_k_view = like(heads_view(grad_k, "grad_k"), op.k_s);
}

inline int64_t items_of(const Attention& op) { return op.batch * op.heads / op.group; }

inline void run_maps(const Attention& op) {
  const cpu::Table& kernels = table();
  run_items(items_of(op), kernels.attention_scratch(op), [&](int64_t item, float* scratch) { kernels.attention_maps(op, item, scratch); });
}

// Tokens behind the last packed sequence belong to none: 0 in a contiguous output [tokens, ...].
inline void clear_behind_sequences(const AttentionCall& call, Tensor& out) {
  if (!call.packed() || call.cu_seqlens.back() == call.total) return;
  const int64_t bytes = out.stride(0) * static_cast<int64_t>(out.element_size()), used = call.cu_seqlens.back();
  std::memset(static_cast<char*>(out.mutable_data_ptr()) + used * bytes, 0, (call.total - used) * bytes);
}

// A gradient of forward or backward, for the kernel to fill.
inline Tensor new_attention_gradient(const AttentionCall& call, const Tensor& x, ScalarType dtype) {
  Tensor out = new_gradient(x, dtype);
  clear_behind_sequences(call, out);
  return out;
}

// Sum of row losses in row order, so that it depends on nothing but the rows.
inline double sum_rows(const float* rows, int64_t n) {
  double total = 0;
  for (int64_t i = 0; i < n; ++i) total += rows[i];
  return total;
}

inline Tensor empty_saved(const Tensor& like) { return torch::stable::new_empty(like, {0}, ScalarType::Float); }

// The shape of "none": [batch, heads, tokens], packed [tokens, heads]; without the heads where rows join them all.
inline std::vector<int64_t> row_shape(const AttentionCall& call) {
  const Attention& op = call.op;
  std::vector<int64_t> shape = call.packed() ? std::vector<int64_t>{call.total, op.heads}
                                             : std::vector<int64_t>{op.batch, op.heads, op.tokens};
  if (op.q_s.joined != 1) shape.erase(shape.begin() + 1);
  return shape;
}

// The forward pass of the row losses (attention_kl, relation_kl). op.grad_weight and row_loss are filled in here.
inline Tensor run_kl(AttentionCall& call, const Tensor& like, int64_t reduction) {
  Attention& op = call.op;
  const int64_t real = call.packed() ? call.cu_seqlens.back() : count_real(op.mask, call.total);
  const float weight = reduction == kBatchMean ? 1.0f / static_cast<float>(std::max<int64_t>(op.heads * real, 1)) : 1.0f;
  op.grad_weight = weight;
  Tensor row_loss = torch::stable::new_empty(like, row_shape(call), ScalarType::Float);
  clear_behind_sequences(call, row_loss);
  float* rows = static_cast<float*>(row_loss.mutable_data_ptr());
  op.row_loss = call.packed() ? RowValues<float>{rows, 0, 1, op.heads} : RowValues<float>{rows, op.heads * op.tokens, op.tokens, 1};
  run_maps(op);
  return reduction == kNone ? row_loss : new_scalar(like, sum_rows(rows, row_loss.numel()) * weight);
}

// A value per row, with the shape of "none".
inline RowValues<const float> rows_view(const AttentionCall& call, const Tensor& x, int64_t heads, const char* name) {
  const bool has_heads = call.op.q_s.joined == 1;
  bool fits = x.scalar_type() == ScalarType::Float && x.dim() == (call.packed() ? 1 : 2) + has_heads &&
              x.size(0) == (call.packed() ? call.total : call.op.batch);
  if (has_heads) fits = fits && x.size(1) == heads;
  if (!call.packed()) fits = fits && x.size(-1) == call.op.tokens;
  STD_TORCH_CHECK(fits, name, " must be float32 with one value per row of the loss");
  const int64_t head = has_heads ? x.stride(1) : 0;
  return {static_cast<const float*>(x.const_data_ptr()), call.packed() ? 0 : x.stride(0), head, call.packed() ? x.stride(0) : x.stride(-1)};
}

// For backward of reduction "none": every row has its own upstream gradient, so the maps are made again.
inline void weigh_rows(AttentionCall& call, const Tensor& grad) {
  call.op.row_weight = rows_view(call, grad, call.op.heads, "grad");
  call.op.grad_weight = 1;
}

}  // namespace kd
