// What the losses on hidden states share on the torch side: lists of layers to kd::HiddenLayers, blocks of tokens to threads.
#pragma once
#include <algorithm>
#include <vector>

#include "common.h"

namespace kd {

inline StatesView states_view(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() == 3, name, " must be [batch, tokens, features]");
  return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2), dtype_of(x, name)};
}

// One op (HiddenLayers or what adds to it) and what it points to.
template <typename Op>
struct HiddenCall {
  Op op{};
  std::vector<HiddenLayer> layers;
  std::vector<double> partial;
  int64_t items = 0, real = 0;  // real: tokens, at least 1
};

// Everything but the layers' grad_weight and what the op adds.
template <typename Op>
HiddenCall<Op> describe_hidden(const std::vector<Tensor>& student, const std::vector<Tensor>& teacher, const std::optional<Tensor>& mask) {
  STD_TORCH_CHECK(!student.empty() && student.size() == teacher.size(), "student and teacher must be lists of as many layers");
  HiddenCall<Op> call;
  call.op.batch = student[0].size(0);
  call.op.tokens = student[0].size(1);
  const int64_t all = call.op.batch * call.op.tokens;
  call.op.mask = mask_of(mask, all);
  call.real = std::max<int64_t>(count_real(call.op.mask, all), 1);
  for (size_t l = 0; l < student.size(); ++l) {
    const Tensor &s = student[l], &t = teacher[l];
    const HiddenLayer layer{states_view(s, "student"), states_view(t, "teacher"), s.size(2), call.items, 0, nullptr};
    STD_TORCH_CHECK(s.size(0) == call.op.batch && s.size(1) == call.op.tokens && t.size(0) == call.op.batch && t.size(1) == call.op.tokens,
                    "all layers must agree in batch and tokens");
    STD_TORCH_CHECK(t.size(2) == layer.features && layer.features > 0, "student and teacher must have as many features, at least one");
    call.layers.push_back(layer);
    const int64_t per_item = cpu::hidden_tokens_per_item(layer.features);
    call.items += (all + per_item - 1) / per_item;
  }
  call.op.layers = call.layers.data();
  call.op.num_layers = static_cast<int64_t>(call.layers.size());
  return call;
}

template <typename Op, typename Kernel>
void run_hidden_items(const HiddenCall<Op>& call, Kernel kernel) {
  constexpr int64_t kTogether = 16;  // items of 64 KiB of float32: 1 MB (12 x 8x256x768 bf16: 3.9 -> 3.5 ms forward and backward)
  run_items(call.items, cpu::hidden_scratch(call.op), [&](int64_t item, float* scratch) { kernel(call.op, item, scratch); }, kTogether);
}

// The loss: every token's times weight(layer). One thread adds the blocks up in order, so it depends on nothing but the values.
template <typename Op, typename Kernel, typename Weight>
Tensor run_hidden_forward(HiddenCall<Op>& call, const Tensor& like, Kernel kernel, const Weight& weight) {
  call.partial.resize(call.items);
  call.op.partial = call.partial.data();
  run_hidden_items(call, kernel);
  double total = 0;
  for (int64_t item = 0, l = 0; item < call.items; ++item) {
    while (l + 1 < call.op.num_layers && call.layers[l + 1].first_item <= item) ++l;
    total += call.partial[item] * weight(call.layers[l]);
  }
  return new_scalar(like, total);
}

// Memory for the students' gradients for this upstream gradient, which the next run of the kernel fills.
template <typename Op>
std::vector<Tensor> want_gradients(HiddenCall<Op>& call, const float& upstream, const std::vector<Tensor>& student) {
  call.op.upstream = &upstream;
  std::vector<Tensor> grads;
  int64_t bytes = 0;
  for (size_t l = 0; l < student.size(); ++l) {
    grads.push_back(new_gradient(student[l], student[l].scalar_type()));
    call.layers[l].grad_student = grads[l].mutable_data_ptr();
    bytes += grads[l].numel() * grads[l].element_size();
  }
  call.op.past_cache = past_cache(bytes);
  return grads;
}

template <typename Op, typename Kernel>
std::vector<Tensor> run_hidden_backward(HiddenCall<Op>& call, const Tensor& grad, const std::vector<Tensor>& student, Kernel kernel) {
  const float upstream = upstream_of(grad);
  std::vector<Tensor> grads = want_gradients(call, upstream, student);
  run_hidden_items(call, kernel);
  return grads;
}

}  // namespace kd
