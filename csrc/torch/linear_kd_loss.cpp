// linear_kd_loss for CPU tensors: chunks of real rows through both heads, kd_loss's rows in place, and back.
//
// A chunk of rows has its logits in two buffers. Products go by panels of classes, each on one thread of torch's: torch's BLAS splits a
// product over threads by their number, which would show in its rounding. kd_loss's kernel turns the student's logits into their
// gradient where they stand. A panel then adds its share to the weight's gradient, and leaves its share of the hidden gradient where
// the teacher's logits were, to be added up in the order of panels. Logits are float32 products: of 16-bit ones the sign of p_s - p_t
// may be noise. Their gradient takes the student's type, as autograd has it: products with it lose no more than their operands did.
#include <dlfcn.h>

#include <array>
#include <cmath>
#include <vector>

#include "kd_rows.h"

namespace kd {
namespace {

constexpr int64_t kChunkBytes = 60 << 20;  // both sides' logits
constexpr int64_t kLeastRows = 32;         // of a chunk, whatever the vocabulary: a product with fewer waits for the weights
constexpr int64_t kPanel = 1024;           // classes; 1.5 MB of a weight of 384 features

// One side: its real rows [n, D], and the layer that makes logits of them.
struct Head {
  Tensor hidden, weight;
  std::optional<Tensor> bias;
  ScalarType dtype;  // of the hidden states and of products with the gradient: the tensors' own where it is one, else float32
  int64_t features, bytes;
};

Tensor matrix(const void* data, std::array<int64_t, 2> size, std::array<int64_t, 2> stride, ScalarType dtype) {
  return torch::stable::from_blob(const_cast<void*>(data), size, stride, torch::stable::Device(torch::headeronly::DeviceType::CPU), dtype);
}

Head head_of(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias, std::vector<int64_t>* real, int64_t classes,
             const char* name) {
  STD_TORCH_CHECK(hidden.dim() == 3, name, "_hidden must be [outer, inner, features]");
  const int64_t features = hidden.size(2);
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(0) == classes && weight.size(1) == features && features > 0, name,
                  "_weight must be [classes, features]");
  STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == classes), name, "_bias must be [classes]");
  dtype_of(hidden, name);
  dtype_of(weight, name);
  const ScalarType dtype = hidden.scalar_type() == weight.scalar_type() ? weight.scalar_type() : ScalarType::Float;
  Tensor rows = torch::stable::reshape(hidden, {hidden.size(0) * hidden.size(1), features});
  if (real) {
    const int64_t n = static_cast<int64_t>(real->size());
    const Tensor index = torch::stable::from_blob(real->data(), {n}, {1}, hidden.device(), ScalarType::Long);
    std::array<StableIValue, 3> stack{torch::stable::detail::from(rows), torch::stable::detail::from(int64_t{0}),
                                      torch::stable::detail::from(index)};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::index_select", "", stack.data(), TORCH_ABI_VERSION));
    rows = torch::stable::detail::to<Tensor>(stack[0]);
  }
  Head head{torch::stable::contiguous(torch::stable::to(rows, dtype)), weight, std::nullopt, dtype, features,
            dtype == ScalarType::Float ? 4 : 2};
  if (bias) head.bias = torch::stable::contiguous(torch::stable::to(*bias, ScalarType::Float));
  return head;
}

// Rows [first, first + n) of the weight; no view of it, since threads of torch's would record that for autograd.
Tensor panel_of(const Head& head, int64_t first, int64_t n, ScalarType dtype) {
  const Tensor& w = head.weight;
  const char* data = static_cast<const char*>(w.const_data_ptr()) + first * w.stride(0) * static_cast<int64_t>(w.element_size());
  return torch::stable::to(matrix(data, {n, head.features}, {w.stride(0), w.stride(1)}, w.scalar_type()), dtype);
}

Tensor rows_of(const Head& head, int64_t first, int64_t n) {
  return matrix(static_cast<const char*>(head.hidden.const_data_ptr()) + first * head.features * head.bytes, {n, head.features},
                {head.features, 1}, head.dtype);
}

void multiply(const Tensor& a, const Tensor& b, const Tensor& out) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b), torch::stable::detail::from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  (void)torch::stable::detail::to<Tensor>(stack[0]);
}

// out = hidden weight^T + bias for classes [first, first + n).
void logits_of(const Head& head, const Tensor& hidden, int64_t first, int64_t n, const Tensor& out) {
  std::optional<Tensor> bias;
  if (head.bias)
    bias = torch::stable::from_blob(static_cast<float*>(head.bias->data_ptr()) + first, {n}, {1}, head.bias->device(), ScalarType::Float);
  std::array<StableIValue, 4> stack{torch::stable::detail::from(hidden),
                                    torch::stable::detail::from(panel_of(head, first, n, ScalarType::Float)),
                                    torch::stable::detail::from(bias), torch::stable::detail::from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "out", stack.data(), TORCH_ABI_VERSION));
  (void)torch::stable::detail::to<Tensor>(stack[0]);
}

// While it lives, products that this thread asks for run on it alone. In a parallel region they do so anyway, but MKL and oneDNN
// still choose how to cut a product up by the number of threads that they could have. Looked up by name: torch need not be built
// with either, and has no stable function for it.
class OneThread {
 public:
  OneThread() {
    if (set_mkl()) before_ = set_mkl()(1);
    if (set_openmp()) set_openmp()(1);  // of the region's task: it ends with the region
  }
  ~OneThread() {
    if (set_mkl()) set_mkl()(before_);
  }
  OneThread(const OneThread&) = delete;
  OneThread& operator=(const OneThread&) = delete;

 private:
  static void* find(const char* name) {
    static void* torch_cpu = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
    return dlsym(torch_cpu ? torch_cpu : RTLD_DEFAULT, name);
  }
  static auto set_mkl() -> int (*)(int) {
    static const auto set = reinterpret_cast<int (*)(int)>(find("MKL_Set_Num_Threads_Local"));
    return set;
  }
  static auto set_openmp() -> void (*)(int) {
    static const auto set = reinterpret_cast<void (*)(int)>(find("omp_set_num_threads"));
    return set;
  }
  int before_ = 0;
};

// run_items, each item on one thread with the products that it asks for, even where there is one item.
template <typename F>
void run_products(int64_t items, const F& fn) {
  const int64_t threads = static_cast<int64_t>(torch::stable::get_num_threads());
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    std::optional<OneThread> guard;
    if (threads > 1) guard.emplace();  // a region: with one thread there is none, and nothing to change
    for (int64_t item = next++; item < items; item = next++) fn(item);
  });
}

// The call as kd_loss has it over all rows, and what it becomes over the real ones.
struct Call {
  KdLoss all;
  std::vector<int64_t> real;
  std::vector<int64_t> labels;
  std::vector<float> temperatures, stats;
  Head student, teacher;
  // Factors of the two terms relative to `unit`, which joins after the products: before them, 1 / rows would underflow in fp16.
  cpu::KdWeights weights;
  float unit;
};

// Gradients for an upstream of 1, up to `unit`; or with the upstream gradient of each row folded in.
struct Gradients {
  Tensor student, weight, bias;
};

Call describe_linear(const Tensor& student, const Tensor& student_weight, const std::optional<Tensor>& student_bias,
                     const Tensor& teacher, const Tensor& teacher_weight, const std::optional<Tensor>& teacher_bias,
                     const std::optional<Tensor>& mask, const std::optional<Tensor>& labels, const std::optional<Tensor>& row_temperature,
                     int64_t kind, double temperature, bool scale_t2, double beta, double alpha, int64_t ignore_index, int64_t reduction) {
  KdLoss all = describe(student, student, mask, labels, row_temperature, kind, temperature, scale_t2, beta, alpha, ignore_index, reduction);
  STD_TORCH_CHECK(teacher.dim() == 3 && teacher.size(0) == all.outer && teacher.size(1) == all.inner,
                  "teacher_hidden must have the student's rows");
  STD_TORCH_CHECK(student_weight.dim() == 2, "student_weight must be [classes, features]");
  all.classes = student_weight.size(0);
  check_labels(all);
  std::vector<int64_t> real;
  const int64_t rows = all.outer * all.inner;
  for (int64_t r = 0; r < rows; ++r)
    if (!all.mask || all.mask[r]) real.push_back(r);
  std::vector<int64_t>* index = static_cast<int64_t>(real.size()) < rows ? &real : nullptr;
  Head s = head_of(student, student_weight, student_bias, index, all.classes, "student");
  Head t = head_of(teacher, teacher_weight, teacher_bias, index, all.classes, "teacher");
  Call call{all, real, {}, {}, std::vector<float>(real.size() * kKdStats), s, t, weights_of(all), 1};
  for (int64_t r : real) {
    if (all.labels) call.labels.push_back(all.labels[r]);
    if (all.row_temperature) call.temperatures.push_back(all.row_temperature[r]);
  }
  const float larger = std::max(std::abs(call.weights.soft), std::abs(call.weights.hard));
  if (larger > 0) call.unit = larger;
  call.weights = {call.weights.soft / call.unit, call.weights.hard / call.unit};
  return call;
}

// One chunk of real rows, and where its logits, gradient and the panels' shares of the hidden gradient are.
struct Chunk {
  int64_t first, rows, panel, panels;
  float *student, *teacher;
};

Tensor panel_logits(const Chunk& chunk, float* data, int64_t classes, int64_t first, int64_t n) {
  return matrix(data + first, {chunk.rows, n}, {classes, 1}, ScalarType::Float);
}

// The chunk's losses into the statistics, and if asked for its gradient in place of the student's logits.
void run_rows(Call& call, const Chunk& chunk, const float* upstream, bool gradient) {
  static const float one = 1;
  KdLoss op = call.all;
  op.mask = nullptr;
  op.labels = call.all.labels ? call.labels.data() + chunk.first : nullptr;
  op.row_temperature = call.all.row_temperature ? call.temperatures.data() + chunk.first : nullptr;
  op.outer = 1;
  op.inner = chunk.rows;
  op.stats = call.stats.data() + chunk.first * kKdStats;
  op.student = {chunk.student, 0, op.classes, 1, DType::kF32};
  op.teacher = {chunk.teacher, 0, op.classes, 1, DType::kF32};
  op.grad_student = chunk.student;
  op.grad_loss = upstream ? upstream + chunk.first : &one;
  op.grad_stride_inner = upstream ? 1 : 0;
  const int64_t per_item = cpu::kd_rows_per_item(op);
  const cpu::Table& kernels = table();
  run_items((chunk.rows + per_item - 1) / per_item, 0, [&](int64_t item, float*) {
    kernels.kd_loss_forward(op, item);
    if (gradient) kernels.kd_loss_backward(op, call.weights, item);
  });
}

void run_gradients(const Call& call, const Chunk& chunk, const Gradients& to) {
  const Head& head = call.student;
  const int64_t classes = call.all.classes, features = head.features, share = chunk.rows * features * head.bytes;
  const cpu::Table& kernels = table();
  const DType dtype = dtype_of(head.hidden, "student");
  float *weight = static_cast<float*>(to.weight.mutable_data_ptr()), *hidden = static_cast<float*>(to.student.mutable_data_ptr());
  float* bias = head.bias ? static_cast<float*>(to.bias.mutable_data_ptr()) : nullptr;
  char* shares = reinterpret_cast<char*>(chunk.teacher);
  const bool keep = chunk.first > 0;
  const Tensor rows = rows_of(head, chunk.first, chunk.rows);
  run_products(chunk.panels, [&](int64_t p) {
    const int64_t first = p * chunk.panel, n = std::min(chunk.panel, classes - first);
    const Tensor gradient = torch::stable::to(panel_logits(chunk, chunk.student, classes, first, n), head.dtype);
    Tensor of_weight = torch::stable::new_empty(rows, {n, features}, head.dtype);
    multiply(torch::stable::transpose(gradient, 0, 1), rows, of_weight);
    kernels.add_rows({of_weight.const_data_ptr(), dtype, 1, 0, n * features, weight + first * features, keep});
    if (bias) kernels.add_rows({chunk.student + first, DType::kF32, chunk.rows, classes, n, bias + first, keep});
    multiply(gradient, panel_of(head, first, n, head.dtype), matrix(shares + p * share, {chunk.rows, features}, {features, 1}, head.dtype));
  });
  run_items(chunk.rows, 0, [&](int64_t r, float*) {
    kernels.add_rows({shares + r * features * head.bytes, dtype, chunk.panels, chunk.rows * features, features,
                      hidden + call.real[chunk.first + r] * features, false});
  });
}

// All chunks. `upstream`: of each real row, or null for 1. `to`: where the gradients go, or null.
void run(Call& call, const float* upstream, const Gradients* to) {
  const int64_t n = static_cast<int64_t>(call.real.size()), classes = call.all.classes;
  if (n == 0) return;
  const Head &s = call.student, &t = call.teacher;
  const int64_t most = std::max<int64_t>(kLeastRows, kChunkBytes / (2 * classes * static_cast<int64_t>(sizeof(float))));
  const int64_t chunks = (n + most - 1) / most, rows = (n + chunks - 1) / chunks;
  // As wide as it takes for the panels' shares [panels, rows, features] to fit where the teacher's logits were.
  const int64_t panel = round_up_to(std::max(kPanel, s.features), 64), panels = (classes + panel - 1) / panel;
  Tensor student = new_tensor(s.hidden, {rows, classes}, ScalarType::Float);
  Tensor teacher = new_tensor(s.hidden, {rows, to ? std::max(classes, panels * s.features) : classes}, ScalarType::Float);
  for (int64_t first = 0; first < n; first += rows) {
    const Chunk chunk{first, std::min(rows, n - first), panel, panels, static_cast<float*>(student.mutable_data_ptr()),
                      static_cast<float*>(teacher.mutable_data_ptr())};
    const Tensor hidden_s = torch::stable::to(rows_of(s, first, chunk.rows), ScalarType::Float);
    const Tensor hidden_t = torch::stable::to(rows_of(t, first, chunk.rows), ScalarType::Float);
    run_products(2 * panels, [&](int64_t item) {
      const bool of_student = item >= panels;  // the wider teacher first: threads end together
      const int64_t begin = item % panels * panel, width = std::min(panel, classes - begin);
      const Head& head = of_student ? s : t;
      logits_of(head, of_student ? hidden_s : hidden_t, begin, width,
                panel_logits(chunk, of_student ? chunk.student : chunk.teacher, classes, begin, width));
    });
    run_rows(call, chunk, upstream, to != nullptr);
    if (to) run_gradients(call, chunk, *to);
  }
}

Tensor zeros(const Tensor& like, bool wanted) {
  if (!wanted) return torch::stable::new_empty(like, {0}, ScalarType::Float);
  Tensor out = new_gradient(like, ScalarType::Float);
  return torch::stable::zero_(out);
}

// Every element of the weight's gradient is written by the first chunk, every real row of the hidden gradient by its own.
Gradients new_gradients(const Call& call, const Tensor& student, const Tensor& weight, const std::optional<Tensor>& bias, bool wanted) {
  const bool none = call.real.empty();
  Tensor of_student = static_cast<int64_t>(call.real.size()) < call.all.outer * call.all.inner || !wanted
                          ? zeros(student, wanted) : new_gradient(student, ScalarType::Float);
  Tensor of_weight = none || !wanted ? zeros(weight, wanted) : new_gradient(weight, ScalarType::Float);
  return {of_student, of_weight, zeros(bias ? *bias : student, wanted && bias)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_kd_loss(
    const Tensor& student, const Tensor& student_weight, std::optional<Tensor> student_bias, const Tensor& teacher,
    const Tensor& teacher_weight, std::optional<Tensor> teacher_bias, std::optional<Tensor> mask, std::optional<Tensor> labels,
    std::optional<Tensor> row_temperature, int64_t kind, double temperature, bool scale_t2, double beta, double alpha,
    int64_t ignore_index, int64_t reduction, bool need_grad) {
  Call call = describe_linear(student, student_weight, student_bias, teacher, teacher_weight, teacher_bias, mask, labels, row_temperature,
                              kind, temperature, scale_t2, beta, alpha, ignore_index, reduction);
  const bool wanted = need_grad && call.all.reduction != kNone;
  Gradients gradients = new_gradients(call, student, student_weight, student_bias, wanted);
  run(call, nullptr, wanted ? &gradients : nullptr);
  std::vector<float> stats(call.all.outer * call.all.inner * kKdStats);
  for (size_t i = 0; i < call.real.size(); ++i)
    std::copy_n(&call.stats[i * kKdStats], +kKdStats, &stats[call.real[i] * kKdStats]);
  call.all.stats = stats.data();
  return {loss_of_rows(call.all, student), gradients.student, gradients.weight, gradients.bias};
}

std::tuple<Tensor, Tensor, Tensor> linear_kd_loss_backward(
    const Tensor& grad, const Tensor& student, const Tensor& student_weight, std::optional<Tensor> student_bias, const Tensor& teacher,
    const Tensor& teacher_weight, std::optional<Tensor> teacher_bias, std::optional<Tensor> mask, std::optional<Tensor> labels,
    std::optional<Tensor> row_temperature, const Tensor& d_student, const Tensor& d_weight, const Tensor& d_bias, int64_t kind,
    double temperature, bool scale_t2, double beta, double alpha, int64_t ignore_index, int64_t reduction) {
  Call call = describe_linear(student, student_weight, student_bias, teacher, teacher_weight, teacher_bias, mask, labels, row_temperature,
                              kind, temperature, scale_t2, beta, alpha, ignore_index, reduction);
  Gradients gradients{d_student, d_weight, d_bias};
  float factor = call.unit;
  if (call.all.reduction == kNone) {
    STD_TORCH_CHECK(grad.scalar_type() == ScalarType::Float && grad.dim() == 2 && grad.size(0) == call.all.outer &&
                        grad.size(1) == call.all.inner, "grad must be float32 with the shape of the loss");
    std::vector<float> upstream;
    for (int64_t r : call.real)
      upstream.push_back(static_cast<const float*>(grad.const_data_ptr())[r / call.all.inner * grad.stride(0) +
                                                                          r % call.all.inner * grad.stride(1)]);
    gradients = new_gradients(call, student, student_weight, student_bias, true);
    run(call, upstream.data(), &gradients);
  } else {
    factor *= upstream_of(grad);
  }
  const Tensor no_bias = torch::stable::new_empty(student, {0}, student.scalar_type());
  return {scaled(factor, gradients.student, student), scaled(factor, gradients.weight, student_weight),
          student_bias ? scaled(factor, gradients.bias, *student_bias) : no_bias};
}

}  // namespace
}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("linear_kd_loss", TORCH_BOX(&kd::linear_kd_loss));
  m.impl("linear_kd_loss_backward", TORCH_BOX(&kd::linear_kd_loss_backward));
}
