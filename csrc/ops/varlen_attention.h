// Attention within sequences that lie end to end: out = softmax(scale q k^T) v per sequence and head, for inference.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace kd {

// [tokens, heads * size]: head h of token t begins at t * stride_token + h * size * stride_column.
struct TokensView {
  const void* data;
  int64_t stride_token, stride_column;
  DType dtype;
};

struct VarlenAttention {
  TokensView q, k, v;
  const int32_t* cu_seqlens;  // [sequences + 1]: sequence b is tokens [cu_seqlens[b], cu_seqlens[b + 1])
  int64_t sequences, longest;  // tokens of the longest sequence
  int64_t tokens;              // rows of q, k and v; on CUDA cu_seqlens[sequences] may be less, and what lies behind is not touched
  int64_t heads, size;
  float scale;  // > 0
  void* out;    // [tokens, heads * size], contiguous
  DType out_dtype;
};

}  // namespace kd
