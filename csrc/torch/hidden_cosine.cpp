// hidden_cosine for CPU tensors.
#include "hidden.h"

namespace kd {
namespace {

HiddenCall<HiddenLayers> describe(const std::vector<Tensor>& student, const std::vector<Tensor>& teacher,
                                  const std::optional<Tensor>& mask) {
  HiddenCall<HiddenLayers> call = describe_hidden<HiddenLayers>(student, teacher, mask);
  for (HiddenLayer& layer : call.layers) layer.grad_weight = static_cast<float>(1.0 / call.real);
  return call;
}

// The loss and, if wanted, the gradients for an upstream of 1.
std::tuple<Tensor, std::vector<Tensor>> hidden_cosine(std::vector<Tensor> student, std::vector<Tensor> teacher,
                                                      std::optional<Tensor> mask, bool need_grad) {
  HiddenCall<HiddenLayers> call = describe(student, teacher, mask);
  const float upstream = 1;
  std::vector<Tensor> grads;
  if (need_grad) grads = want_gradients(call, upstream, student);
  const auto mean = [&](const HiddenLayer&) { return 1.0 / call.real; };
  return {run_hidden_forward(call, student[0], table().hidden_cosine, mean), grads};
}

std::vector<Tensor> hidden_cosine_backward(const Tensor& grad, std::vector<Tensor> student, std::vector<Tensor> teacher,
                                           std::optional<Tensor> mask) {
  HiddenCall<HiddenLayers> call = describe(student, teacher, mask);
  return run_hidden_backward(call, grad, student, table().hidden_cosine);
}

}  // namespace
}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("hidden_cosine", TORCH_BOX(&kd::hidden_cosine));
  m.impl("hidden_cosine_backward", TORCH_BOX(&kd::hidden_cosine_backward));
}
