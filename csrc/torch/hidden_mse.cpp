// hidden_mse for CPU tensors: lists of layers to kd::HiddenMse, blocks of tokens to threads.
#include <vector>

#include "common.h"

namespace kd {
namespace {

StatesView states_view(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() == 3, name, " must be [batch, tokens, features]");
  return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2), dtype_of(x, name)};
}

// One op and what it points to.
struct Described {
  HiddenMse op{};
  std::vector<HiddenLayer> layers;
  int64_t items = 0;
};

Described describe(const std::vector<Tensor>& student, const std::vector<Tensor>& teacher, const std::optional<Tensor>& mask,
                   int64_t normalize) {
  STD_TORCH_CHECK(!student.empty() && student.size() == teacher.size(), "student and teacher must be lists of as many layers");
  Described d;
  d.op.batch = student[0].size(0);
  d.op.tokens = student[0].size(1);
  const int64_t all = d.op.batch * d.op.tokens;
  d.op.mask = mask_of(mask, all);
  d.op.normalize = static_cast<Normalize>(normalize);
  const int64_t real = count_real(d.op.mask, all);
  for (size_t l = 0; l < student.size(); ++l) {
    const Tensor &s = student[l], &t = teacher[l];
    HiddenLayer layer{states_view(s, "student"), states_view(t, "teacher"), s.size(2), d.items, 0, nullptr};
    STD_TORCH_CHECK(s.size(0) == d.op.batch && s.size(1) == d.op.tokens && t.size(0) == d.op.batch && t.size(1) == d.op.tokens,
                    "all layers must agree in batch and tokens");
    STD_TORCH_CHECK(t.size(2) == layer.features && layer.features > 0, "student and teacher must have as many features, at least one");
    layer.grad_weight = static_cast<float>(2.0 / (static_cast<double>(real < 1 ? 1 : real) * layer.features));
    d.layers.push_back(layer);
    const int64_t per_item = cpu::hidden_tokens_per_item(layer.features);
    d.items += (all + per_item - 1) / per_item;
  }
  d.op.layers = d.layers.data();
  d.op.num_layers = static_cast<int64_t>(d.layers.size());
  return d;
}

std::tuple<Tensor, std::vector<Tensor>> hidden_mse(std::vector<Tensor> student, std::vector<Tensor> teacher, std::optional<Tensor> mask,
                                                   std::vector<Tensor> weight, std::vector<Tensor> bias, int64_t normalize,
                                                   bool) {
  STD_TORCH_CHECK(weight.empty() && bias.empty(), "hidden_mse with a projection is not on the CPU yet");
  Described d = describe(student, teacher, mask, normalize);
  std::vector<double> partial(d.items);
  d.op.partial = partial.data();
  const cpu::Table& kernels = table();
  run_items(d.items, cpu::hidden_scratch(d.op), [&](int64_t item, float* scratch) { kernels.hidden_forward(d.op, item, scratch); });
  // One thread adds the blocks up in order: the sum depends on nothing but the values.
  double total = 0;
  for (int64_t item = 0, l = 0; item < d.items; ++item) {
    while (l + 1 < d.op.num_layers && d.layers[l + 1].first_item <= item) ++l;
    total += partial[item] * (d.layers[l].grad_weight / 2);
  }
  Tensor loss = torch::stable::new_empty(student[0], {}, ScalarType::Float);
  *static_cast<float*>(loss.mutable_data_ptr()) = static_cast<float>(total);
  return {loss, std::vector<Tensor>{}};
}

std::vector<Tensor> hidden_mse_backward(const Tensor& grad, std::vector<Tensor> student, std::vector<Tensor> teacher,
                                        std::optional<Tensor> mask, std::vector<Tensor>, std::vector<Tensor>,
                                        std::vector<Tensor>, int64_t normalize) {
  STD_TORCH_CHECK(grad.scalar_type() == ScalarType::Float && grad.numel() == 1, "grad must be a float32 scalar");
  Described d = describe(student, teacher, mask, normalize);
  d.op.upstream = static_cast<const float*>(grad.const_data_ptr());
  std::vector<Tensor> grads;
  for (size_t l = 0; l < student.size(); ++l) {
    grads.push_back(new_tensor(student[l], student[l].sizes(), student[l].scalar_type()));
    d.layers[l].grad_student = grads[l].mutable_data_ptr();
  }
  const cpu::Table& kernels = table();
  run_items(d.items, cpu::hidden_scratch(d.op), [&](int64_t item, float* scratch) { kernels.hidden_backward(d.op, item, scratch); });
  return grads;
}

}  // namespace
}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("hidden_mse", TORCH_BOX(&kd::hidden_mse));
  m.impl("hidden_mse_backward", TORCH_BOX(&kd::hidden_mse_backward));
}
