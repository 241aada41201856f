// kd_loss for CPU tensors: tensors to kd::KdLoss, rows to threads, row losses to the reduction asked for.
#include "common.h"

namespace kd {
namespace {

LogitsView logits_view(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() == 3, name, " must be [outer, inner, classes]");
  return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2), dtype_of(x, name)};
}

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

KdLoss describe(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& mask,
                const std::optional<Tensor>& labels, const std::optional<Tensor>& row_temperature, int64_t kind,
                double temperature, bool scale_t2, double beta, double alpha, int64_t ignore_index, int64_t reduction) {
  KdLoss op{};
  op.student = logits_view(student, "student");
  op.teacher = logits_view(teacher, "teacher");
  op.outer = student.size(0);
  op.inner = student.size(1);
  op.classes = student.size(2);
  const int64_t rows = op.outer * op.inner;
  STD_TORCH_CHECK(teacher.size(0) == op.outer && teacher.size(1) == op.inner && teacher.size(2) == op.classes,
                  "teacher must have the student's shape");
  op.mask = mask_of(mask, rows);
  if (labels) {
    STD_TORCH_CHECK(labels->scalar_type() == ScalarType::Long && labels->is_contiguous() && labels->numel() == rows,
                    "labels must be contiguous int64 with one value per row");
    op.labels = static_cast<const int64_t*>(labels->const_data_ptr());
    for (int64_t r = 0; r < rows; ++r)
      STD_TORCH_CHECK((op.mask && !op.mask[r]) || op.labels[r] == ignore_index || (op.labels[r] >= 0 && op.labels[r] < op.classes),
                      "labels must be in [0, ", op.classes, ") or ignore_index = ", ignore_index, ", got ", op.labels[r]);
  }
  if (row_temperature) {
    STD_TORCH_CHECK(row_temperature->scalar_type() == ScalarType::Float && row_temperature->is_contiguous() &&
                        row_temperature->numel() == rows,
                    "row_temperature must be contiguous float32 with one value per row");
    op.row_temperature = static_cast<const float*>(row_temperature->const_data_ptr());
  }
  op.temperature = static_cast<float>(temperature);
  op.beta = static_cast<float>(beta);
  op.alpha = static_cast<float>(alpha);
  op.scale_t2 = scale_t2;
  op.ignore_index = ignore_index;
  op.kind = static_cast<Kind>(kind);
  op.reduction = static_cast<Reduction>(reduction);
  return op;
}

std::tuple<Tensor, Tensor> kd_loss(const Tensor& student, const Tensor& teacher, std::optional<Tensor> mask,
                                   std::optional<Tensor> labels, std::optional<Tensor> row_temperature, int64_t kind,
                                   double temperature, bool scale_t2, double beta, double alpha, int64_t ignore_index,
                                   int64_t reduction) {
  KdLoss op = describe(student, teacher, mask, labels, row_temperature, kind, temperature, scale_t2, beta, alpha, ignore_index,
                       reduction);
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
  STD_TORCH_CHECK(grad.scalar_type() == ScalarType::Float && grad.dim() == (op.reduction == kNone ? 2 : 0),
                  "grad must be float32 with the shape of the loss");
  const int64_t rows = op.outer * op.inner, per_item = cpu::kd_rows_per_item(op);
  STD_TORCH_CHECK(stats.is_contiguous() && stats.numel() == rows * kKdStats, "stats must come from kd_loss");
  op.stats = static_cast<float*>(stats.mutable_data_ptr());
  op.grad_loss = static_cast<const float*>(grad.const_data_ptr());
  if (op.reduction == kNone) {
    op.grad_stride_outer = grad.stride(0);
    op.grad_stride_inner = grad.stride(1);
  }
  Tensor grad_student = new_tensor(student, {op.outer, op.inner, op.classes}, student.scalar_type());
  op.grad_student = grad_student.mutable_data_ptr();
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
