// The attention losses share one contract: two pairs of queries and keys, which tokens are real, gradients of the student's pair.
// relation_kl passes the same tensor as queries and keys.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace kd {

// [batch, heads, tokens, size] by element strides. A row of it is the `size` numbers of one (batch, head, token), or, where `joined` is
// not 1, of that many heads side by side: scores that are summed over heads are one product of rows that long.
struct HeadsView {
  const void* data;
  int64_t stride_batch, stride_head, stride_token, stride_size, size;
  DType dtype;
  int64_t joined = 1;  // heads of a row
  int64_t group = 1;   // heads of the loss that share one head of this tensor (grouped queries)
};

// [batch, heads, tokens] by element strides; null data: not given.
template <typename T>
struct RowValues {
  T* data;
  int64_t stride_batch, stride_head, stride_token;
};

// [batch, heads, tokens, tokens] by element strides, what a model adds to its scores; null data: nothing.
struct BiasView {
  const void* data;
  int64_t stride_batch, stride_head, stride_query, stride_key;
  DType dtype;
  int64_t joined;  // heads that are added up
  float factor;    // what multiplies it: 1 / temperature, over the heads where their mean is wanted
};

enum class MapLoss : int32_t { kKl, kReverseKl, kMseProbs, kMseScores };

struct Attention {
  HeadsView q_s, k_s, q_t, k_t;
  const bool* mask;  // [batch, tokens] or null: all real

  // Packed batches: sequence b is tokens cu_seqlens[b] ... cu_seqlens[b + 1] of all, `tokens` is the length of the longest, and the
  // strides over the batch are 0. Null: every sequence has `tokens`.
  const int64_t* cu_seqlens;

  int64_t batch, heads, tokens;
  int64_t group = 1;        // heads whose keys' gradient is one head: an item computes them one after another
  const int64_t* head_map;  // the teacher's head for each of the student's; null: the same
  float scale_s, scale_t;   // what multiplies q k^T, temperature included
  BiasView bias_s, bias_t;
  bool causal;  // a query sees the keys up to its own token
  MapLoss kind;

  // log sum_j exp(x_ij) of rows, where the models have left them; used where both are given.
  RowValues<const float> lse_s, lse_t;

  RowValues<float> row_loss;  // 0 where masked; or null
  double* item_loss;         // [batch, heads]: their sums; or null

  // MSE of scores, [2, batch, heads, d_s + d_t, d_s]: the student's columns of two Gram matrices, of the keys and of the queries. Forward
  // leaves them for backward (null: not wanted); -1 comes first where the scores are to be made in tiles instead.
  double* gram;

  // Gradients of the student's queries and keys; null: not wanted. Row (b, h, i) weighs grad_weight times, if row_weight is given,
  // row_weight at (b, h, i). relation_kl: grad_k is null and grad_q gets the sum of both.
  void *grad_q, *grad_k;
  HeadsView grad_q_view, grad_k_view;  // strides and dtype of the two outputs; their data pointers are not used
  float grad_weight;
  RowValues<const float> row_weight;
};

}  // namespace kd
