// topk_kd_loss: what one call is. A row has K + 1 outcomes: the K classes that the teacher named, and all others together ("rest").
// Over them the loss is a kd_loss: the rest's logit is T log sum exp(logit / T) over its classes. With V >> K the work is to read a
// row of logits once for that sum, and to write its gradient once.
#pragma once
#include "kd_loss.h"

namespace kd {

// What backward needs of a row's rest, beside the kd_loss's own statistics.
enum TopkStat : int32_t {
  kRestMax = 0,   // max of the rest's logits
  kRestInvZ = 1,  // 1 / sum over the rest of exp((s - max) / T); 0 where it is empty
  kHardMax = 2,   // max of all logits of the row, with labels only
  kHardInvZ = 3,  // 1 / sum over all classes of exp(s - max)
  kTopkStats = 4
};

struct TopkKdLoss {
  // Over K + 1 outcomes: contiguous float32 rows that forward writes, the student's relative to its rest's logit. Its mask, temperatures,
  // weights and reduction are the call's; it has no labels, and backward leaves the gradients of the outcomes in its grad_student.
  KdLoss named;
  float* named_student;  // what named.student and named.teacher point to, [rows, K + 1]
  float* named_teacher;

  LogitsView student;   // [outer, inner, classes]
  LogitsView values;    // [outer, inner, K]
  const void* indices;  // [outer, inner, K], int64 if wide, else int32
  int64_t index_stride_outer, index_stride_inner, index_stride_class;
  bool wide;
  int64_t classes, count;  // V and K
  bool bucket;             // values are log-probabilities at T, the rest has what they leave; else the rest has nothing
  const int64_t* labels;   // [rows] or null
  int64_t ignore_index;

  float* rest;         // [rows, kTopkStats]
  void* grad_student;  // backward: contiguous [rows, classes] of the student's dtype
  bool past_cache;     // as in kd_loss
};

}  // namespace kd
