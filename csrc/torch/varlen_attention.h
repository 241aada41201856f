// What ops with varlen attention inside share: tensors checked and put into its struct.
#pragma once
#include "common.h"

namespace kd {

// q, k, v and what the op is told of them. `op` lacks its sequences and its output.
inline VarlenAttention describe_attention(const Tensor& q, const Tensor& k, const Tensor& v, int64_t num_heads, double scale) {
  const auto view = [&](const Tensor& x, const char* name) -> TokensView {
    STD_TORCH_CHECK(x.dim() == 2 && q.dim() == 2 && x.size(0) == q.size(0) && x.size(1) == q.size(1), name,
                    " must be [tokens, heads * size] as q is");
    return {x.const_data_ptr(), x.stride(0), x.stride(1), dtype_of(x, name)};
  };
  VarlenAttention op{};
  op.q = view(q, "q");
  op.k = view(k, "k");
  op.v = view(v, "v");
  STD_TORCH_CHECK(num_heads > 0 && q.size(1) > 0 && q.size(1) % num_heads == 0, "num_heads must divide the features of q");
  STD_TORCH_CHECK(scale > 0, "scale must be > 0");
  op.tokens = q.size(0);
  op.heads = num_heads;
  op.size = q.size(1) / num_heads;
  op.scale = static_cast<float>(scale);
  return op;
}

inline void describe_bounds(const Tensor& cu_seqlens, VarlenAttention& op) {
  STD_TORCH_CHECK(cu_seqlens.scalar_type() == ScalarType::Int && cu_seqlens.dim() == 1 && cu_seqlens.is_contiguous() &&
                      cu_seqlens.numel() > 0,
                  "cu_seqlens must be contiguous int32 [sequences + 1]");
  op.cu_seqlens = static_cast<const int32_t*>(cu_seqlens.const_data_ptr());
  op.sequences = cu_seqlens.numel() - 1;
}

// Puts the sequences of cu_seqlens, which lies in the host's memory and must cover `tokens`, into op.
inline void describe_sequences(const Tensor& cu_seqlens, int64_t tokens, VarlenAttention& op) {
  describe_bounds(cu_seqlens, op);
  op.tokens = tokens;
  bool rising = op.cu_seqlens[0] == 0 && op.cu_seqlens[op.sequences] == tokens;
  for (int64_t i = 0; i < op.sequences; ++i) {
    const int64_t length = int64_t{op.cu_seqlens[i + 1]} - op.cu_seqlens[i];
    rising = rising && length >= 0;
    op.longest = std::max(op.longest, length);
  }
  STD_TORCH_CHECK(rising, "cu_seqlens must rise from 0 to the number of tokens");
}

}  // namespace kd
