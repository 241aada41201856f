// What ops with varlen attention inside share: the lengths of sequences, checked.
#pragma once
#include "common.h"

namespace kd {

// Puts the sequences of cu_seqlens, which must cover `tokens`, into op.
inline void describe_sequences(const Tensor& cu_seqlens, int64_t tokens, VarlenAttention& op) {
  STD_TORCH_CHECK(cu_seqlens.scalar_type() == ScalarType::Int && cu_seqlens.dim() == 1 && cu_seqlens.is_contiguous() &&
                      cu_seqlens.numel() > 0,
                  "cu_seqlens must be contiguous int32 [sequences + 1]");
  op.cu_seqlens = static_cast<const int32_t*>(cu_seqlens.const_data_ptr());
  op.sequences = cu_seqlens.numel() - 1;
  bool rising = op.cu_seqlens[0] == 0 && op.cu_seqlens[op.sequences] == tokens;
  for (int64_t i = 0; i < op.sequences; ++i) {
    const int64_t length = int64_t{op.cu_seqlens[i + 1]} - op.cu_seqlens[i];
    rising = rising && length >= 0;
    op.longest = std::max(op.longest, length);
  }
  STD_TORCH_CHECK(rising, "cu_seqlens must rise from 0 to the number of tokens");
}

}  // namespace kd
