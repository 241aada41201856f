// kd_loss for CUDA tensors: allocates, fills kd::KdLoss and queues the kernels on torch's current stream.
//
// The library links no CUDA part of torch, so that it builds and loads beside a CPU build. The one thing wanted from there, the
// current stream, is looked up when the first CUDA tensor arrives; torch's CUDA library is in the process by then.
#include <dlfcn.h>

#include "../cuda/kd_loss.h"
#include "kd_loss.h"

namespace kd {
namespace {

void* current_stream(const Tensor& x) {
  using Get = AOTITorchError (*)(int32_t device, void** stream);
  static const auto get = [] {
    // Python opens torch privately: its symbols are found in the library that is loaded already, or globally in another program.
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<Get>(dlsym(torch_cuda ? torch_cuda : RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream"));
  }();
  STD_TORCH_CHECK(get, "kdkernels: this build of torch has no CUDA, there is no stream to run on");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(get(x.get_device_index(), &stream));
  return stream;
}

void check_status(int status, const char* op) {
  STD_TORCH_CHECK(status == 0, "kdkernels.", op, " on CUDA failed: ", cuda::status_text(status));
}

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
