// hidden_mse for CPU tensors: lists of layers to kd::HiddenMse, or with a projection to one kd::HiddenProjection after the other.
#include "hidden.h"

namespace kd {
namespace {

// w, where the loss is w / 2 times the sum of squares and its gradient w times the difference.
double grad_weight_of(int64_t real, int64_t features) { return 2.0 / (static_cast<double>(std::max<int64_t>(real, 1)) * features); }

HiddenCall<HiddenMse> describe(const std::vector<Tensor>& student, const std::vector<Tensor>& teacher, const std::optional<Tensor>& mask,
                               int64_t normalize) {
  HiddenCall<HiddenMse> call = describe_hidden<HiddenMse>(student, teacher, mask);
  call.op.normalize = static_cast<Normalize>(normalize);
  for (HiddenLayer& layer : call.layers) layer.grad_weight = static_cast<float>(grad_weight_of(call.real, layer.features));
  return call;
}

HiddenProjection describe_projection(const Tensor& student, const Tensor& teacher, const Tensor& weight, const Tensor* bias,
                                     const std::vector<int64_t>& real, int64_t normalize) {
  HiddenProjection op{};
  op.student = states_view(student, "student");
  op.teacher = states_view(teacher, "teacher");
  op.batch = student.size(0);
  op.tokens = student.size(1);
  op.d_s = student.size(2);
  op.d_t = teacher.size(2);
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(0) == op.d_t && weight.size(1) == op.d_s, "weight must be [D_t, D_s]");
  op.weight = weight.const_data_ptr();
  op.weight_stride_row = weight.stride(0);
  op.weight_stride_column = weight.stride(1);
  op.weight_dtype = dtype_of(weight, "weight");
  if (bias) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == op.d_t, "bias must be [D_t]");
    op.bias = bias->const_data_ptr();
    op.bias_stride = bias->stride(0);
    op.bias_dtype = dtype_of(*bias, "bias");
  }
  op.real = real.data();
  op.rows = static_cast<int64_t>(real.size());
  op.normalize = static_cast<Normalize>(normalize);
  op.grad_weight = static_cast<float>(grad_weight_of(op.rows, op.d_t));
  return op;
}

// Runs all layers and returns the loss. The gradient of a layer's weight needs all of its rows; the next layer's rows run beside it, so
// that threads wait for each other once a layer. Two layers are under way at a time.
double run_projections(const cpu::Table& kernels, std::vector<HiddenProjection>& ops, const Tensor& like, int64_t weights) {
  const int64_t layers = static_cast<int64_t>(ops.size());
  cpu::ProjectionPlan most{};
  for (const HiddenProjection& op : ops) {
    const cpu::ProjectionPlan plan = kernels.projection_plan(op);
    most = {plan.block, std::max(most.packed_weight, plan.packed_weight), std::max(most.packed_rows, plan.packed_rows),
            std::max(most.scratch, plan.scratch)};
  }
  const int64_t rows_floats = round_up_to(most.packed_rows, 16), weight_floats = round_up_to(most.packed_weight, 16);
  Tensor workspace = new_tensor(like, {weights * weight_floats + std::min<int64_t>(layers, 2) * rows_floats}, ScalarType::Float);
  float* memory = static_cast<float*>(workspace.mutable_data_ptr());
  const int64_t blocks = cpu::projection_row_blocks(ops[0].rows, most.block);
  std::vector<double> partial(layers * blocks);
  for (int64_t l = 0; l < layers; ++l) {
    ops[l].partial = partial.data() + l * blocks;
    ops[l].packed_weight = memory + (weights == 1 ? 0 : l) * weight_floats;
    ops[l].packed_rows = memory + weights * weight_floats + l % 2 * rows_floats;
  }
  for (int64_t w = 0; w < weights; ++w)
    run_items(cpu::projection_blocks(ops[w].d_t, most.block), most.scratch,
              [&](int64_t item, float* scratch) { kernels.projection_pack(ops[w], item, scratch); });
  for (int64_t l = 0; l <= layers; ++l) {
    const bool weight = l > 0 && ops[l - 1].grad_matrix;
    const int64_t weight_items = weight ? cpu::projection_blocks(ops[l - 1].d_t, most.block) : 0;
    run_items(weight_items + (l < layers ? blocks : 0), most.scratch, [&](int64_t item, float* scratch) {
      item < weight_items ? kernels.projection_weight(ops[l - 1], item, scratch)
                          : kernels.projection_rows(ops[l], item - weight_items, scratch);
    });
  }
  double loss = 0;
  for (int64_t i = 0; i < layers * blocks; ++i) loss += partial[i] * grad_weight_of(ops[0].rows, ops[i / blocks].d_t) / 2;
  return loss;
}

std::tuple<Tensor, std::vector<Tensor>> project(const std::vector<Tensor>& student, const std::vector<Tensor>& teacher,
                                                const std::optional<Tensor>& mask, const std::vector<Tensor>& weight,
                                                const std::vector<Tensor>& bias, int64_t normalize, bool need_grad) {
  const int64_t layers = static_cast<int64_t>(student.size()), weights = static_cast<int64_t>(weight.size());
  STD_TORCH_CHECK(layers > 0 && student.size() == teacher.size(), "student and teacher must be lists of as many layers");
  STD_TORCH_CHECK((weights == 1 || weights == layers) && (bias.empty() || bias.size() == weight.size()),
                  "weight must be one tensor or one per layer, and bias likewise");
  const int64_t batch = student[0].size(0), tokens = student[0].size(1);
  const bool* is_real = mask_of(mask, batch * tokens);
  std::vector<int64_t> real;
  for (int64_t i = 0; i < batch * tokens; ++i)
    if (!is_real || is_real[i]) real.push_back(i);

  std::vector<Tensor> saved;
  if (need_grad)
    for (const auto* inputs : {&student, &weight, &bias})
      for (const Tensor& x : *inputs) saved.push_back(new_gradient(x, ScalarType::Float));

  std::vector<HiddenProjection> ops;
  for (int64_t l = 0; l < layers; ++l) {
    const int64_t shared = weights == 1 ? 0 : l;
    for (const Tensor* x : {&student[l], &teacher[l]})
      STD_TORCH_CHECK(x->dim() == 3 && x->size(0) == batch && x->size(1) == tokens, "all layers must agree in batch and tokens");
    ops.push_back(describe_projection(student[l], teacher[l], weight[shared], bias.empty() ? nullptr : &bias[shared], real, normalize));
    if (!need_grad) continue;
    const auto gradient = [&](int64_t i) { return static_cast<float*>(saved[i].mutable_data_ptr()); };
    ops[l].grad_student = gradient(l);
    ops[l].grad_matrix = gradient(layers + shared);
    if (!bias.empty()) ops[l].grad_bias = gradient(layers + weights + shared);
    ops[l].accumulate = l != shared;
  }
  double loss = run_projections(table(), ops, student[0], weights);
  if (table().exact && !std::isfinite(loss)) loss = run_projections(*table().exact, ops, student[0], weights);
  return {new_scalar(student[0], loss), saved};
}

std::tuple<Tensor, std::vector<Tensor>> hidden_mse(std::vector<Tensor> student, std::vector<Tensor> teacher, std::optional<Tensor> mask,
                                                   std::vector<Tensor> weight, std::vector<Tensor> bias, int64_t normalize,
                                                   bool need_grad) {
  if (!weight.empty()) return project(student, teacher, mask, weight, bias, normalize, need_grad);
  HiddenCall<HiddenMse> call = describe(student, teacher, mask, normalize);
  const auto mean = [&](const HiddenLayer& layer) { return grad_weight_of(call.real, layer.features) / 2; };
  return {run_hidden_forward(call, student[0], table().hidden_forward, mean), std::vector<Tensor>{}};
}

std::vector<Tensor> hidden_mse_backward(const Tensor& grad, std::vector<Tensor> student, std::vector<Tensor> teacher,
                                        std::optional<Tensor> mask, std::vector<Tensor> weight, std::vector<Tensor> bias,
                                        std::vector<Tensor> saved, int64_t normalize) {
  if (!weight.empty()) {
    std::vector<Tensor> grads;
    STD_TORCH_CHECK(saved.size() == student.size() + weight.size() + bias.size(), "saved must come from hidden_mse");
    for (const auto* inputs : {&student, &weight, &bias})
      for (const Tensor& x : *inputs) grads.push_back(scale_gradient(grad, saved[grads.size()], x));
    return grads;
  }
  HiddenCall<HiddenMse> call = describe(student, teacher, mask, normalize);
  return run_hidden_backward(call, grad, student, table().hidden_backward);
}

}  // namespace
}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("hidden_mse", TORCH_BOX(&kd::hidden_mse));
  m.impl("hidden_mse_backward", TORCH_BOX(&kd::hidden_mse_backward));
}
