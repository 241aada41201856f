// attention_map_mse and attention_map_kl: two attention maps given as scores, a mask over tokens, the gradient of the student's.
// A map is one head, or all heads of a batch entry where they are summed or averaged first.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace kd {

// [batch, heads, tokens, tokens] by element strides.
struct ScoresView {
  const void* data;
  int64_t stride_batch, stride_head, stride_query, stride_key;
  int64_t heads;  // that are summed to one map; the heads of a map are neighbours
  DType dtype;
};

// What backward needs of a row of attention_map_kl; 16 bytes.
enum MapStat : int32_t {
  kMapMaxS = 0,   // max of the student's summed scores (not scaled)
  kMapInvZS = 1,  // 1 / sum exp(scale_s (s - max))
  kMapMaxT = 2,   // the same of the teacher
  kMapInvZT = 3,
  kMapStats = 4
};

struct AttentionMap {
  ScoresView student, teacher;
  const int32_t* real_tokens;  // [batch, tokens]: which tokens are real, in order, at the front of each row
  const int64_t* num_real;     // [batch]
  int64_t batch, maps, tokens;
  float scale_s, scale_t;  // what multiplies the summed scores: 1 / temperature, and 1 / heads for their mean
  bool kl;                 // of the softmax; else squared differences

  float* stats;     // [batch, maps, tokens, kMapStats], 0 where masked; null for squared differences
  float* row_loss;  // forward: [batch, maps, tokens], 0 where masked; or null
  double* partial;  // forward: one sum of row losses per item

  // Backward: row (b, m, i) weighs grad_weight times, if row_weight is not null, row_weight at (b, m, i).
  void* grad_student;  // contiguous, with the student's shape and dtype
  bool past_cache;     // on the CPU: the gradient is too large to be still in a cache when somebody reads it
  float grad_weight;
  const float* row_weight;
  int64_t row_weight_stride_batch, row_weight_stride_map, row_weight_stride_token;
};

}  // namespace kd
