// gram_mse for CPU tensors: rounds of tiles, one after the other, their items to threads.
#include <cmath>
#include <cstring>

#include "hidden.h"

namespace kd {
namespace {

GramFactor gram_factor(const Tensor& x, const char* name, const Tensor& first) {
  STD_TORCH_CHECK(x.dim() == 3 && x.size(0) == first.size(0) && x.size(1) == first.size(1) && x.size(2) > 0,
                  "all states must be [batch, tokens, features] and agree in batch and tokens");
  return {states_view(x, name), x.size(2)};
}

// The loss, and gradients in `saved` where wanted.
double run_gram(const cpu::Table& kernels, GramMse op, int64_t lines, const std::vector<Tensor>& saved) {
  for (const Tensor& sum : saved) {
    const int64_t bytes = sum.numel() / std::max<int64_t>(op.batch, 1) * sizeof(float);
    char* first = static_cast<char*>(sum.mutable_data_ptr());
    run_items(op.batch, 0, [&](int64_t sequence, float*) { std::memset(first + sequence * bytes, 0, bytes); });
  }
  op.block = kernels.gram_block(op.batch, lines);
  op.blocks = (lines + op.block - 1) / op.block;
  const int64_t items = op.batch * op.blocks;
  std::vector<double> partial(op.blocks * items);
  op.partial = partial.data();
  for (int64_t round = 0; round < op.blocks; ++round)
    run_items(items, kernels.gram_scratch(op), [&](int64_t item, float* scratch) { kernels.gram_tile(op, round * items + item, scratch); });
  double total = 0;
  for (const double sum : partial) total += sum;
  return total * op.weight;
}

std::tuple<Tensor, std::vector<Tensor>> gram_mse(const Tensor& s0, std::optional<Tensor> s1, const Tensor& t0, std::optional<Tensor> t1,
                                                 std::optional<Tensor> mask, int64_t over, bool need_grad) {
  STD_TORCH_CHECK(s1.has_value() == t1.has_value(), "s1 and t1 must both be given or both be missing");
  GramMse op{};
  op.symmetric = !s1;
  op.over_token = over == 1;
  op.batch = s0.size(0);
  op.tokens = s0.size(1);
  op.s0 = gram_factor(s0, "s0", s0);
  op.t0 = gram_factor(t0, "t0", s0);
  op.s1 = s1 ? gram_factor(*s1, "s1", s0) : op.s0;
  op.t1 = t1 ? gram_factor(*t1, "t1", s0) : op.t0;
  STD_TORCH_CHECK(op.over_token ? op.s0.features == op.s1.features && op.t0.features == op.t1.features
                                : op.s0.features == op.t0.features && op.s1.features == op.t1.features,
                  "widths must agree: of a product's factors over tokens, of student and teacher over the hidden axis");

  const bool* is_real = mask_of(mask, op.batch * op.tokens);
  std::vector<int64_t> real, first{0};
  int64_t longest = 0;
  double entries = 0;
  for (int64_t b = 0; b < op.batch; ++b) {
    for (int64_t i = b * op.tokens; i < (b + 1) * op.tokens; ++i)
      if (!is_real || is_real[i]) real.push_back(i);
    const int64_t n = static_cast<int64_t>(real.size()) - first.back();
    first.push_back(static_cast<int64_t>(real.size()));
    longest = std::max(longest, n);
    if (n > 0) entries += op.over_token ? static_cast<double>(n) * n : static_cast<double>(op.s0.features) * op.s1.features;
  }
  op.real = real.data();
  op.first = first.data();
  const int64_t lines = op.over_token ? longest : std::max(op.s0.features, op.s1.features);
  op.weight = 1 / std::max(entries, 1.0);

  std::vector<Tensor> saved;
  if (need_grad) {
    saved.push_back(new_gradient(s0, ScalarType::Float));
    if (s1) saved.push_back(new_gradient(*s1, ScalarType::Float));
    op.grad_0 = static_cast<float*>(saved.front().mutable_data_ptr());
    op.grad_1 = static_cast<float*>(saved.back().mutable_data_ptr());
  }
  double loss = run_gram(table(), op, lines, saved);
  if (table().exact && !std::isfinite(loss)) loss = run_gram(*table().exact, op, lines, saved);
  return {new_scalar(s0, loss), saved};
}

std::vector<Tensor> gram_mse_backward(const Tensor& grad, const Tensor& s0, std::optional<Tensor> s1, const Tensor&, std::optional<Tensor>,
                                      std::optional<Tensor> mask, std::vector<Tensor> saved, int64_t) {
  mask_of(mask, s0.size(0) * s0.size(1));
  STD_TORCH_CHECK(saved.size() == (s1 ? 2u : 1u), "saved must come from gram_mse");
  std::vector<Tensor> grads{scale_gradient(grad, saved[0], s0)};
  if (s1) grads.push_back(scale_gradient(grad, saved[1], *s1));
  return grads;
}

}  // namespace
}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("gram_mse", TORCH_BOX(&kd::gram_mse));
  m.impl("gram_mse_backward", TORCH_BOX(&kd::gram_mse_backward));
}
