// topk_kd_loss for CPU tensors: tensors to kd::TopkKdLoss, rows to threads.
#include <vector>

#include "kd_rows.h"

namespace kd {
namespace {

// The call as kd_loss has it, on the student's logits: labels, counts and weights are those of V classes.
struct Described {
  KdLoss call;
  TopkKdLoss op;
};

Described describe_topk(const Tensor& student, const Tensor& values, const Tensor& indices, const std::optional<Tensor>& mask,
                        const std::optional<Tensor>& labels, const std::optional<Tensor>& row_temperature, int64_t tail, int64_t kind,
                        double temperature, bool scale_t2, double beta, double alpha, int64_t ignore_index, int64_t reduction) {
  Described d{describe(student, student, mask, labels, row_temperature, kind, temperature, scale_t2, beta, alpha, ignore_index, reduction),
              {}};
  check_labels(d.call);
  TopkKdLoss& op = d.op;
  op.named = d.call;
  op.named.labels = nullptr;
  op.student = d.call.student;
  op.values = logits_view(values, "values");
  op.classes = d.call.classes;
  op.count = values.size(2);
  op.named.classes = op.count + 1;
  STD_TORCH_CHECK(values.size(0) == d.call.outer && values.size(1) == d.call.inner && op.count >= 1 && op.count <= op.classes,
                  "values must be [outer, inner, K] with 1 <= K <= classes");
  op.wide = indices.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(op.wide || indices.scalar_type() == ScalarType::Int, "indices must be int32 or int64");
  STD_TORCH_CHECK(indices.dim() == 3 && indices.size(0) == d.call.outer && indices.size(1) == d.call.inner && indices.size(2) == op.count,
                  "indices must have the shape of values");
  op.indices = indices.const_data_ptr();
  op.index_stride_outer = indices.stride(0);
  op.index_stride_inner = indices.stride(1);
  op.index_stride_class = indices.stride(2);
  op.bucket = tail != 0;
  op.labels = d.call.labels;
  op.ignore_index = ignore_index;
  return d;
}

// The named classes of real rows are distinct and within the row: kernels write to where they point.
template <typename Index>
void check_indices(const TopkKdLoss& op) {
  std::vector<bool> seen(op.classes);
  for (int64_t r = 0; r < op.named.outer * op.named.inner; ++r) {
    if (op.named.mask && !op.named.mask[r]) continue;
    const Index* row = static_cast<const Index*>(op.indices) + r / op.named.inner * op.index_stride_outer +
                       r % op.named.inner * op.index_stride_inner;
    for (int64_t k = 0; k < op.count; ++k) {
      const int64_t c = row[k * op.index_stride_class];
      STD_TORCH_CHECK(c >= 0 && c < op.classes, "teacher_indices must be in [0, ", op.classes, "), got ", c);
      STD_TORCH_CHECK(!seen[c], "teacher_indices must not name a class twice in a row, got ", c, " twice");
      seen[c] = true;
    }
    for (int64_t k = 0; k < op.count; ++k) seen[row[k * op.index_stride_class]] = false;
  }
}

int64_t items_of(const TopkKdLoss& op) {
  const int64_t per_item = cpu::topk_rows_per_item(op);
  return (op.named.outer * op.named.inner + per_item - 1) / per_item;
}

// named [2, rows, K + 1]: both sides' outcomes; stats and rest: see the contract.
void point_to(TopkKdLoss& op, const Tensor& named, const Tensor& stats, const Tensor& rest) {
  const int64_t rows = op.named.outer * op.named.inner, outcomes = op.named.classes;
  op.named_student = static_cast<float*>(named.mutable_data_ptr());
  op.named_teacher = op.named_student + rows * outcomes;
  op.named.student = {op.named_student, op.named.inner * outcomes, outcomes, 1, DType::kF32};
  op.named.teacher = {op.named_teacher, op.named.inner * outcomes, outcomes, 1, DType::kF32};
  op.named.stats = static_cast<float*>(stats.mutable_data_ptr());
  op.rest = static_cast<float*>(rest.mutable_data_ptr());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> topk_kd_loss(const Tensor& student, const Tensor& values, const Tensor& indices,
                                                        std::optional<Tensor> mask, std::optional<Tensor> labels,
                                                        std::optional<Tensor> row_temperature, int64_t tail, int64_t kind,
                                                        double temperature, bool scale_t2, double beta, double alpha,
                                                        int64_t ignore_index, int64_t reduction) {
  Described d = describe_topk(student, values, indices, mask, labels, row_temperature, tail, kind, temperature, scale_t2, beta, alpha,
                              ignore_index, reduction);
  TopkKdLoss& op = d.op;
  op.wide ? check_indices<int64_t>(op) : check_indices<int32_t>(op);
  const int64_t rows = op.named.outer * op.named.inner;
  Tensor named = new_tensor(student, {2, rows, op.named.classes}, ScalarType::Float);
  Tensor stats = new_tensor(student, {rows, static_cast<int64_t>(kKdStats)}, ScalarType::Float);
  Tensor rest = new_tensor(student, {rows, static_cast<int64_t>(kTopkStats)}, ScalarType::Float);
  point_to(op, named, stats, rest);
  const cpu::Table& kernels = table();
  run_items(items_of(op), kernels.topk_scratch(op), [&](int64_t item, float* scratch) { kernels.topk_forward(op, item, scratch); });
  d.call.stats = op.named.stats;
  return {loss_of_rows(d.call, student), named, stats, rest};
}

Tensor topk_kd_loss_backward(const Tensor& grad, const Tensor& student, const Tensor& values, const Tensor& indices,
                             std::optional<Tensor> mask, std::optional<Tensor> labels, std::optional<Tensor> row_temperature,
                             const Tensor& named, const Tensor& stats, const Tensor& rest, int64_t tail, int64_t kind,
                             double temperature, bool scale_t2, double beta, double alpha, int64_t ignore_index, int64_t reduction) {
  Described d = describe_topk(student, values, indices, mask, labels, row_temperature, tail, kind, temperature, scale_t2, beta, alpha,
                              ignore_index, reduction);
  TopkKdLoss& op = d.op;
  op.wide ? check_indices<int64_t>(op) : check_indices<int32_t>(op);
  const int64_t rows = op.named.outer * op.named.inner;
  STD_TORCH_CHECK(named.is_contiguous() && named.numel() == 2 * rows * op.named.classes, "named must come from topk_kd_loss");
  STD_TORCH_CHECK(rest.is_contiguous() && rest.numel() == rows * kTopkStats, "rest must come from topk_kd_loss");
  describe_backward(op.named, grad, stats, student);
  point_to(op, named, stats, rest);
  Tensor grad_named = new_tensor(student, {rows, op.named.classes}, ScalarType::Float);
  Tensor grad_student = new_tensor(student, {op.named.outer, op.named.inner, op.classes}, student.scalar_type());
  op.named.grad_student = grad_named.mutable_data_ptr();
  op.grad_student = grad_student.mutable_data_ptr();
  op.past_cache = past_cache(grad_student.numel() * grad_student.element_size());
  const cpu::KdWeights weights = weights_of(d.call);
  const cpu::Table& kernels = table();
  run_items(items_of(op), kernels.topk_scratch(op),
            [&](int64_t item, float* scratch) { kernels.topk_backward(op, weights, item, scratch); });
  return grad_student;
}

}  // namespace
}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("topk_kd_loss", TORCH_BOX(&kd::topk_kd_loss));
  m.impl("topk_kd_loss_backward", TORCH_BOX(&kd::topk_kd_loss_backward));
}
