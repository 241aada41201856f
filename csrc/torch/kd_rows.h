// What the CPU side of every loss on logits shares: how many rows each term is reduced over, and the loss from its row losses.
#pragma once
#include "kd_loss.h"

namespace kd {

inline void check_labels(const KdLoss& op) {
  for (int64_t r = 0; op.labels && r < op.outer * op.inner; ++r)
    STD_TORCH_CHECK((op.mask && !op.mask[r]) || op.labels[r] == op.ignore_index || (op.labels[r] >= 0 && op.labels[r] < op.classes),
                    "labels must be in [0, ", op.classes, ") or ignore_index = ", op.ignore_index, ", got ", op.labels[r]);
}

inline cpu::KdWeights weights_of(const KdLoss& op) {
  const int64_t rows = op.outer * op.inner, real = count_real(op.mask, rows);
  int64_t labelled = 0;
  for (int64_t r = 0; op.labels && r < rows; ++r) labelled += op.labels[r] != op.ignore_index && !(op.mask && !op.mask[r]);
  const auto one_over = [](int64_t n) { return 1.0f / static_cast<float>(n < 1 ? 1 : n); };
  const bool mean = op.reduction == kMean || op.reduction == kBatchMean;
  float soft = mean ? one_over(op.reduction == kMean ? real * op.classes : real) : 1;
  if (op.labels) soft *= op.alpha;
  return {soft, op.labels ? (1 - op.alpha) * (mean ? one_over(labelled) : 1) : 0};
}

// One thread adds the rows up in the same order always: the sum depends on nothing but the rows. In four chains, since in one each
// addition waits for the last (4096 rows: 6 us).
inline double sum_of(const KdLoss& op, KdStat term) {
  const int64_t rows = op.outer * op.inner;
  double sums[4] = {};
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4)
    for (int i = 0; i < 4; ++i) sums[i] += op.stats[(r + i) * kKdStats + term];
  for (; r < rows; ++r) sums[0] += op.stats[r * kKdStats + term];
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// The loss from stats' kSoftLoss and kHardLoss.
inline Tensor loss_of_rows(const KdLoss& op, const Tensor& like) {
  const int64_t rows = op.outer * op.inner;
  const cpu::KdWeights weights = weights_of(op);
  if (op.reduction == kNone) {
    Tensor loss = new_tensor(like, {op.outer, op.inner}, ScalarType::Float);
    float* values = static_cast<float*>(loss.mutable_data_ptr());
    for (int64_t r = 0; r < rows; ++r) {
      const float* row = op.stats + r * kKdStats;
      values[r] = op.labels ? weights.soft * row[kSoftLoss] + weights.hard * row[kHardLoss] : row[kSoftLoss];
    }
    return loss;
  }
  const double soft = sum_of(op, kSoftLoss), hard = op.labels ? sum_of(op, kHardLoss) : 0;
  return new_scalar(like, op.labels ? weights.soft * soft + weights.hard * hard : weights.soft * soft);
}

}  // namespace kd
