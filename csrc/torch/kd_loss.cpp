// kd_loss for CPU tensors: tensors to kd::KdLoss, rows to threads, row losses to the reduction asked for.
#include "kd_loss.h"

namespace kd {
namespace {

// How many rows each term is reduced over.
struct Counts {
  int64_t real, labelled;
};

Counts count_rows(const KdLoss& op) {
  const int64_t rows = op.outer * op.inner;
  Counts counts{count_real(op.mask, rows), 0};
  if (op.labels)
    for (int64_t r = 0; r < rows; ++r) counts.labelled += op.labels[r] != op.ignore_index && !(op.mask && !op.mask[r]);
  return counts;
}

cpu::KdWeights weights_of(const KdLoss& op) {
  const Counts counts = count_rows(op);
  const auto one_over = [](int64_t n) { return 1.0f / static_cast<float>(n < 1 ? 1 : n); };
  const bool mean = op.reduction == kMean || op.reduction == kBatchMean;
  float soft = mean ? one_over(op.reduction == kMean ? counts.real * op.classes : counts.real) : 1;
  if (op.labels) soft *= op.alpha;
  return {soft, op.labels ? (1 - op.alpha) * (mean ? one_over(counts.labelled) : 1) : 0};
}

void check_labels(const KdLoss& op) {
  for (int64_t r = 0; op.labels && r < op.outer * op.inner; ++r)
    STD_TORCH_CHECK((op.mask && !op.mask[r]) || op.labels[r] == op.ignore_index || (op.labels[r] >= 0 && op.labels[r] < op.classes),
                    "labels must be in [0, ", op.classes, ") or ignore_index = ", op.ignore_index, ", got ", op.labels[r]);
}

std::tuple<Tensor, Tensor> kd_loss(const Tensor& student, const Tensor& teacher, std::optional<Tensor> mask,
                                   std::optional<Tensor> labels, std::optional<Tensor> row_temperature, int64_t kind,
                                   double temperature, bool scale_t2, double beta, double alpha, int64_t ignore_index,
                                   int64_t reduction) {
  KdLoss op = describe(student, teacher, mask, labels, row_temperature, kind, temperature, scale_t2, beta, alpha, ignore_index,
                       reduction);
  check_labels(op);
  const int64_t rows = op.outer * op.inner, per_item = cpu::kd_rows_per_item(op);
  Tensor stats = new_tensor(student, {rows, static_cast<int64_t>(kKdStats)}, ScalarType::Float);
  op.stats = static_cast<float*>(stats.mutable_data_ptr());
  const cpu::Table& kernels = table();
  run_items((rows + per_item - 1) / per_item, 0, [&](int64_t item, float*) { kernels.kd_loss_forward(op, item); });

  const cpu::KdWeights weights = weights_of(op);
  if (op.reduction == kNone) {
    Tensor loss = new_tensor(student, {op.outer, op.inner}, ScalarType::Float);
    float* values = static_cast<float*>(loss.mutable_data_ptr());
    for (int64_t r = 0; r < rows; ++r) {
      const float* row = op.stats + r * kKdStats;
      values[r] = op.labels ? weights.soft * row[kSoftLoss] + weights.hard * row[kHardLoss] : row[kSoftLoss];
    }
    return {loss, stats};
  }
  // One thread adds the rows up in order: the sum depends on nothing but the rows.
  double soft = 0, hard = 0;
  for (int64_t r = 0; r < rows; ++r) {
    soft += op.stats[r * kKdStats + kSoftLoss];
    hard += op.stats[r * kKdStats + kHardLoss];
  }
  Tensor loss = new_tensor(student, {}, ScalarType::Float);
  *static_cast<float*>(loss.mutable_data_ptr()) =
      static_cast<float>(op.labels ? weights.soft * soft + weights.hard * hard : weights.soft * soft);
  return {loss, stats};
}

Tensor kd_loss_backward(const Tensor& grad, const Tensor& student, const Tensor& teacher, std::optional<Tensor> mask,
                        std::optional<Tensor> labels, std::optional<Tensor> row_temperature, const Tensor& stats,
                        int64_t kind, double temperature, bool scale_t2, double beta, double alpha, int64_t ignore_index,
                        int64_t reduction) {
  KdLoss op = describe(student, teacher, mask, labels, row_temperature, kind, temperature, scale_t2, beta, alpha, ignore_index,
                       reduction);
  check_labels(op);
  describe_backward(op, grad, stats, student);
  const int64_t rows = op.outer * op.inner, per_item = cpu::kd_rows_per_item(op);
  Tensor grad_student = new_tensor(student, {op.outer, op.inner, op.classes}, student.scalar_type());
  op.grad_student = grad_student.mutable_data_ptr();
  op.past_cache = past_cache(grad_student.numel() * grad_student.element_size());
  const cpu::KdWeights weights = weights_of(op);
  const cpu::Table& kernels = table();
  run_items((rows + per_item - 1) / per_item, 0, [&](int64_t item, float*) { kernels.kd_loss_backward(op, weights, item); });
  return grad_student;
}

}  // namespace
}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("kd_loss", TORCH_BOX(&kd::kd_loss));
  m.impl("kd_loss_backward", TORCH_BOX(&kd::kd_loss_backward));
}
