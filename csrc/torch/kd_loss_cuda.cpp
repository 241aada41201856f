// kd_loss for CUDA tensors: allocates, fills kd::KdLoss and queues the kernels on torch's current stream.
#include "../cuda/kd_loss.h"
#include "kd_loss.h"
#include "stream.h"

namespace kd {
namespace {

float* float_data(const Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }

std::tuple<Tensor, Tensor> kd_loss(const Tensor& student, const Tensor& teacher, std::optional<Tensor> mask,
                                   std::optional<Tensor> labels, std::optional<Tensor> row_temperature, int64_t kind,
                                   double temperature, bool scale_t2, double beta, double alpha, int64_t ignore_index,
                                   int64_t reduction) {
  const torch::stable::accelerator::DeviceGuard guard(student.get_device_index());
  KdLoss op = describe(student, teacher, mask, labels, row_temperature, kind, temperature, scale_t2, beta, alpha, ignore_index,
                       reduction);
  Tensor stats = new_empty(student, {op.outer * op.inner, static_cast<int64_t>(kKdStats)}, ScalarType::Float);
  Tensor loss = op.reduction == kNone ? new_empty(student, {op.outer, op.inner}, ScalarType::Float)
                                      : new_empty(student, {}, ScalarType::Float);
  Tensor workspace = new_empty(student, {cuda::kd_loss_workspace_bytes(op)}, ScalarType::Byte);
  op.stats = float_data(stats);
  op.loss = float_data(loss);
  check_status(cuda::kd_loss_forward(op, workspace.mutable_data_ptr(), current_stream(student)), "kd_loss");
  return {loss, stats};
}

Tensor kd_loss_backward(const Tensor& grad, const Tensor& student, const Tensor& teacher, std::optional<Tensor> mask,
                        std::optional<Tensor> labels, std::optional<Tensor> row_temperature, const Tensor& stats,
                        int64_t kind, double temperature, bool scale_t2, double beta, double alpha, int64_t ignore_index,
                        int64_t reduction) {
  const torch::stable::accelerator::DeviceGuard guard(student.get_device_index());
  KdLoss op = describe(student, teacher, mask, labels, row_temperature, kind, temperature, scale_t2, beta, alpha, ignore_index,
                       reduction);
  describe_backward(op, grad, stats, student);
  Tensor grad_student = new_empty(student, {op.outer, op.inner, op.classes}, student.scalar_type());
  op.grad_student = grad_student.mutable_data_ptr();
  check_status(cuda::kd_loss_backward(op, current_stream(student)), "kd_loss_backward");
  return grad_student;
}

}  // namespace
}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CUDA, m) {
  m.impl("kd_loss", TORCH_BOX(&kd::kd_loss));
  m.impl("kd_loss_backward", TORCH_BOX(&kd::kd_loss_backward));
}
