// The three attention losses share one contract: two pairs of queries and keys, a mask over tokens, gradients of the student's
// pair. relation_kl passes the same tensor as queries and keys.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace kd {

// [batch, heads, tokens, size] by element strides.
struct HeadsView {
  const void* data;
  int64_t stride_batch, stride_head, stride_token, stride_size, size;
  DType dtype;
};

enum class MapLoss : int32_t { kKl, kMseProbs, kMseScores };

struct Attention {
  HeadsView q_s, k_s, q_t, k_t;
  const bool* mask;  // [batch, tokens] or null: all real
  int64_t batch, heads, tokens;
  float scale_s, scale_t;  // what multiplies q k^T, temperature included
  MapLoss kind;

  float* row_loss;    // [batch, heads, tokens], 0 where masked; or null
  double* item_loss;  // [batch, heads]: their sums; or null

  // MSE of scores, [2, batch, heads, d_s + d_t, d_s]: the student's columns of two Gram matrices, of the keys and of the queries. Forward
  // leaves them for backward (null: not wanted); -1 comes first where the scores are to be made in tiles instead.
  double* gram;

  // Gradients of the student's queries and keys; null: not wanted. Row (b, h, i) weighs grad_weight times, if row_weight is not
  // null, row_weight at (b, h, i). relation_kl: grad_k is null and grad_q gets the sum of both.
  void *grad_q, *grad_k;
  HeadsView grad_q_view, grad_k_view;  // strides and dtype of the two outputs; their data pointers are not used
  float grad_weight;
  const float* row_weight;
  int64_t row_weight_stride_batch, row_weight_stride_head, row_weight_stride_token;
};

}  // namespace kd
