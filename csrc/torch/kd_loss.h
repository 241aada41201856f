// From the tensors of a kd_loss call to kd::KdLoss, for every device.
#pragma once
#include "common.h"

#include "../ops/kd_loss.h"

namespace kd {

inline LogitsView logits_view(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() == 3, name, " must be [outer, inner, classes]");
  return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2), dtype_of(x, name)};
}

inline void check_device(const Tensor& x, const char* name, const Tensor& student) {
  STD_TORCH_CHECK(x.device() == student.device(), name, " must be on the student's device");
}

// The call without its outputs. Checks what protects memory; the values of labels are the kernels' business.
inline KdLoss describe(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& mask,
                       const std::optional<Tensor>& labels, const std::optional<Tensor>& row_temperature, int64_t kind,
                       double temperature, bool scale_t2, double beta, double alpha, int64_t ignore_index, int64_t reduction) {
  KdLoss op{};
  op.student = logits_view(student, "student");
  op.teacher = logits_view(teacher, "teacher");
  op.outer = student.size(0);
  op.inner = student.size(1);
  op.classes = student.size(2);
  const int64_t rows = op.outer * op.inner;
  check_device(teacher, "teacher", student);
  if (mask) check_device(*mask, "mask", student);
  if (labels) check_device(*labels, "labels", student);
  if (row_temperature) check_device(*row_temperature, "row_temperature", student);
  STD_TORCH_CHECK(teacher.size(0) == op.outer && teacher.size(1) == op.inner && teacher.size(2) == op.classes,
                  "teacher must have the student's shape");
  op.mask = mask_of(mask, rows);
  if (labels) {
    STD_TORCH_CHECK(labels->scalar_type() == ScalarType::Long && labels->is_contiguous() && labels->numel() == rows,
                    "labels must be contiguous int64 with one value per row");
    op.labels = static_cast<const int64_t*>(labels->const_data_ptr());
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

// What backward reads beside the inputs: the upstream gradient and forward's statistics.
inline void describe_backward(KdLoss& op, const Tensor& grad, const Tensor& stats, const Tensor& student) {
  STD_TORCH_CHECK(grad.scalar_type() == ScalarType::Float && grad.dim() == (op.reduction == kNone ? 2 : 0),
                  "grad must be float32 with the shape of the loss");
  STD_TORCH_CHECK(stats.is_contiguous() && stats.numel() == op.outer * op.inner * kKdStats, "stats must come from kd_loss");
  check_device(grad, "grad", student);
  check_device(stats, "stats", student);
  op.stats = static_cast<float*>(stats.mutable_data_ptr());
  op.grad_loss = static_cast<const float*>(grad.const_data_ptr());
  if (op.reduction == kNone) {
    STD_TORCH_CHECK(grad.size(0) == op.outer && grad.size(1) == op.inner, "grad must have the shape of the loss");
    op.grad_stride_outer = grad.stride(0);
    op.grad_stride_inner = grad.stride(1);
  }
}

}  // namespace kd
