// moment_mse for CPU tensors.
#include "hidden.h"

namespace kd {
namespace {

std::tuple<Tensor, Tensor> moment_mse(std::vector<Tensor> student, std::vector<Tensor> teacher, std::optional<Tensor> mask,
                                      double mean_weight, double variance_weight, int64_t variance, bool need_grad) {
  HiddenCall<MomentMse> call = describe_hidden<MomentMse>(student, teacher, mask);
  call.op.mean_weight = mean_weight;
  call.op.variance_weight = variance_weight;
  call.op.variance = static_cast<VarianceLoss>(variance);
  const int64_t rows = call.op.num_layers * call.op.batch * call.op.tokens;
  Tensor stats = torch::stable::new_empty(student[0], {need_grad ? rows : 0, 3}, ScalarType::Float);
  if (need_grad) call.op.stats = static_cast<float*>(stats.mutable_data_ptr());
  return {run_hidden_forward(call, student[0], table().moment_forward, [&](const HiddenLayer&) { return 1.0 / call.real; }), stats};
}

std::vector<Tensor> moment_mse_backward(const Tensor& grad, std::vector<Tensor> student, std::optional<Tensor> mask,
                                        const Tensor& stats) {
  HiddenCall<MomentMse> call = describe_hidden<MomentMse>(student, student, mask);  // the teacher is in the statistics
  STD_TORCH_CHECK(stats.scalar_type() == ScalarType::Float && stats.is_contiguous() &&
                      stats.numel() == call.op.num_layers * call.op.batch * call.op.tokens * 3,
                  "stats must come from moment_mse");
  call.op.stats = static_cast<float*>(stats.mutable_data_ptr());
  for (HiddenLayer& layer : call.layers) layer.grad_weight = static_cast<float>(1.0 / call.real);
  return run_hidden_backward(call, grad, student, table().moment_backward);
}

}  // namespace
}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("moment_mse", TORCH_BOX(&kd::moment_mse));
  m.impl("moment_mse_backward", TORCH_BOX(&kd::moment_mse_backward));
}
