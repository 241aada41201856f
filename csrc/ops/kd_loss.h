// kd_loss: what one call is, for every device. Rows are (outer, inner) pairs, so that a [B, N, V] slice such as
// logits[:, :-1] needs no copy; masks, labels and statistics are contiguous over rows.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace kd {

enum Kind : int32_t { kKl = 0, kCe = 1, kReverseKl = 2, kJsd = 3, kTv = 4 };
enum Reduction : int32_t { kNone = 0, kSum = 1, kMean = 2, kBatchMean = 3 };

// Row statistics that backward needs; 32 bytes a row. Only the backward of the device that wrote them reads them: cuda/kd_loss.cu
// uses the same slots in its own units, as its caption says.
enum KdStat : int32_t {
  kMaxS = 0,      // max of the student's logits (not divided by T)
  kInvZS = 1,     // 1 / sum exp((s - max) / T)
  kMaxT = 2,      // the same of the teacher
  kInvZT = 3,
  kAux = 4,       // reverse_kl: the row's KL; jsd: KL(p_s || m); tv: sum p_s sign(p_s - p_t) / 2
  kInvZHard = 5,  // 1 / sum exp(s - max): the softmax at T = 1, with labels only
  kSoftLoss = 6,  // the row's soft term, T^2 included; 0 where masked
  kHardLoss = 7,  // the row's cross-entropy; 0 where it has no label
  kKdStats = 8
};

struct LogitsView {
  const void* data;
  int64_t stride_outer, stride_inner, stride_class;  // in elements
  DType dtype;
};

struct KdLoss {
  LogitsView student, teacher;
  const bool* mask;              // [rows] or null: all real
  const int64_t* labels;         // [rows] or null: no hard term
  const float* row_temperature;  // [rows] or null: `temperature` for all
  int64_t outer, inner, classes;
  float temperature, beta, alpha;
  bool scale_t2;
  int64_t ignore_index;
  Kind kind;
  Reduction reduction;

  float* stats;            // [rows, kKdStats]
  float* loss;             // scalar or [rows]
  const float* grad_loss;  // backward: the upstream gradient, a scalar or [outer, inner], read with these strides
  int64_t grad_stride_outer, grad_stride_inner;
  void* grad_student;      // backward: contiguous [rows, classes] of the student's dtype
  bool past_cache;         // backward on the CPU: the gradient is too large to be still in a cache when somebody reads it
};

}  // namespace kd
