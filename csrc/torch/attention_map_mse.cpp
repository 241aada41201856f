// attention_map_mse for CPU tensors.
#include "attention_map.h"

namespace kd {
namespace {

Tensor attention_map_mse(const Tensor& student, const Tensor& teacher, std::optional<Tensor> mask, int64_t head_reduction) {
  MapCall call = describe_maps(student, teacher, mask, head_reduction, 1, false);
  return new_scalar(student, run_map_forward(call) / count_maps(call, true));
}

Tensor attention_map_mse_backward(const Tensor& grad, const Tensor& student, const Tensor& teacher, std::optional<Tensor> mask,
                                  int64_t head_reduction) {
  MapCall call = describe_maps(student, teacher, mask, head_reduction, 1, false);
  call.op.grad_weight = static_cast<float>(upstream_of(grad) / count_maps(call, true));
  return run_map_backward(call, student);
}

}  // namespace
}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("attention_map_mse", TORCH_BOX(&kd::attention_map_mse));
  m.impl("attention_map_mse_backward", TORCH_BOX(&kd::attention_map_mse_backward));
}
