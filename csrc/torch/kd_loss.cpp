// kd_loss for CPU tensors: tensors to kd::KdLoss, rows to threads.
#include "kd_rows.h"

namespace kd {
namespace {

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
  return {loss_of_rows(op, student), stats};
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
