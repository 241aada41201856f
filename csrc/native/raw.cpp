// Raw kernels. A call is prepared once (arrays checked, outputs allocated) and then run many times, so that a microbenchmark times
// the kernel alone. Arrays are float32, float16, or uint16 for the bits of bfloat16.
#include "native/raw.h"

#include <pybind11/numpy.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/gelu_curve.h"
#include "cpu/table.h"

namespace py = pybind11;

namespace kd::native {

namespace {

const cpu::Table& table_of(const std::string& isa) {
  std::string known;
  for (int i = 0; i < cpu::num_candidates; ++i) {
    const cpu::Candidate& candidate = cpu::candidates[i];
    if (!candidate.supported()) continue;
    if (isa == candidate.name) return *candidate.table;
    known += std::string(known.empty() ? "" : ", ") + candidate.name;
  }
  throw std::invalid_argument("isa must be one that this CPU runs (" + known + "), got " + isa);
}

DType dtype_of(const py::array& x, const char* name) {
  if (py::isinstance<py::array_t<float>>(x)) return DType::kF32;
  if (py::isinstance<py::array_t<uint16_t>>(x)) return DType::kBF16;
  if (x.dtype().kind() == 'f' && x.itemsize() == 2) return DType::kF16;
  throw std::invalid_argument(std::string(name) + " must be float32, float16, or uint16 (the bits of bfloat16)");
}

LogitsView logits_view(const py::array& x, const char* name) {
  if (x.ndim() != 2 || x.shape(1) < 1) throw std::invalid_argument(std::string(name) + " must be [rows, classes]");
  return {x.data(), 0, x.strides(0) / x.itemsize(), x.strides(1) / x.itemsize(), dtype_of(x, name)};
}

class KdLossCall {
 public:
  KdLossCall(const std::string& isa, py::array student, py::array teacher, int kind, float temperature)
      : table_(table_of(isa)), student_(std::move(student)), teacher_(std::move(teacher)) {
    op_.student = logits_view(student_, "student");
    op_.teacher = logits_view(teacher_, "teacher");
    op_.outer = 1;
    op_.inner = student_.shape(0);
    op_.classes = student_.shape(1);
    if (teacher_.shape(0) != op_.inner || teacher_.shape(1) != op_.classes)
      throw std::invalid_argument("teacher must have the student's shape");
    if (kind < kKl || kind > kTv) throw std::invalid_argument("kind must be 0 (kl) to 4 (tv), got " + std::to_string(kind));
    if (!(temperature > 0)) throw std::invalid_argument("temperature must be > 0");
    op_.kind = static_cast<Kind>(kind);
    op_.reduction = kSum;
    op_.temperature = temperature;
    op_.beta = 0.5f;
    op_.alpha = 1;
    stats_.resize(op_.inner * kKdStats);
    grad_ = py::array_t<uint8_t>(student_.nbytes());
    op_.stats = stats_.data();
    op_.grad_loss = &one_;
    op_.grad_student = grad_.mutable_data();
    items_ = (op_.inner + cpu::kd_rows_per_item(op_) - 1) / cpu::kd_rows_per_item(op_);
  }

  double forward() {
    {
      py::gil_scoped_release release;
      for (int64_t item = 0; item < items_; ++item) table_.kd_loss_forward(op_, item);
    }
    double loss = 0;
    for (int64_t row = 0; row < op_.inner; ++row) loss += stats_[row * kKdStats + kSoftLoss];
    return loss;
  }

  py::array backward() {
    {
      py::gil_scoped_release release;
      for (int64_t item = 0; item < items_; ++item) table_.kd_loss_backward(op_, {1, 0}, item);
    }
    return py::array(student_.dtype(), std::vector<py::ssize_t>{op_.inner, op_.classes}, grad_.data(), grad_);
  }

 private:
  const cpu::Table& table_;
  py::array student_, teacher_;
  py::array_t<uint8_t> grad_;
  std::vector<float> stats_;
  KdLoss op_{};
  int64_t items_;
  const float one_ = 1;
};

HeadsView heads_view(const py::array& x, const char* name) {
  if (x.ndim() != 3 || x.shape(2) < 1) throw std::invalid_argument(std::string(name) + " must be [heads, tokens, d]");
  const int64_t size = x.itemsize();
  return {x.data(), 0, x.strides(0) / size, x.strides(1) / size, x.strides(2) / size, x.shape(2), dtype_of(x, name)};
}

class AttentionKlCall {
 public:
  AttentionKlCall(const std::string& isa, py::array q_s, py::array k_s, py::array q_t, py::array k_t)
      : table_(table_of(isa)), inputs_{std::move(q_s), std::move(k_s), std::move(q_t), std::move(k_t)} {
    op_.q_s = heads_view(inputs_[0], "q_s");
    op_.k_s = heads_view(inputs_[1], "k_s");
    op_.q_t = heads_view(inputs_[2], "q_t");
    op_.k_t = heads_view(inputs_[3], "k_t");
    op_.batch = 1;
    op_.heads = inputs_[0].shape(0);
    op_.tokens = inputs_[0].shape(1);
    for (const py::array& x : inputs_)
      if (x.shape(0) != op_.heads || x.shape(1) != op_.tokens)
        throw std::invalid_argument("queries and keys must agree in heads and tokens");
    if (op_.q_s.size != op_.k_s.size || op_.q_t.size != op_.k_t.size)
      throw std::invalid_argument("queries and keys must agree in d");
    op_.scale_s = 1 / std::sqrt(static_cast<float>(op_.q_s.size));
    op_.scale_t = 1 / std::sqrt(static_cast<float>(op_.q_t.size));
    op_.kind = MapLoss::kKl;
    op_.grad_weight = 1;
    row_loss_.resize(op_.heads * op_.tokens);
    op_.row_loss = {row_loss_.data(), 0, op_.tokens, 1};
    for (py::array_t<float>* grad : {&grad_q_, &grad_k_}) *grad = py::array_t<float>({op_.heads, op_.tokens, op_.q_s.size});
    op_.grad_q = grad_q_.mutable_data();
    op_.grad_k = grad_k_.mutable_data();
    op_.grad_q_view = heads_view(grad_q_, "grad_q");
    op_.grad_k_view = heads_view(grad_k_, "grad_k");
    const size_t bytes = (table_.attention_scratch(op_) * sizeof(float) + 63) / 64 * 64;
    scratch_.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
    if (!scratch_) throw std::bad_alloc();
  }

  py::tuple run() {
    {
      py::gil_scoped_release release;
      for (int64_t head = 0; head < op_.heads; ++head) table_.attention_maps(op_, head, scratch_.get());
    }
    double loss = 0;
    for (float row : row_loss_) loss += row;
    return py::make_tuple(loss, grad_q_, grad_k_);
  }

 private:
  const cpu::Table& table_;
  py::array inputs_[4];
  py::array_t<float> grad_q_, grad_k_;
  std::vector<float> row_loss_;
  std::unique_ptr<float, decltype(&std::free)> scratch_{nullptr, std::free};
  Attention op_{};
};

// Packed weights and rows of activations, quantised once: what is timed is the product with its float32 epilogue.
class QuantLinearCall {
 public:
  QuantLinearCall(const std::string& isa, py::array_t<float, py::array::c_style> x, py::array_t<uint8_t, py::array::c_style> packed,
                  int activation)
      : table_(table_of(isa)), x_(std::move(x)) {
    Packed view;
    if (const char* wrong = parse_packed(packed.data(), packed.size(), view)) throw std::invalid_argument(wrong);
    if (x_.ndim() != 2 || x_.shape(1) != view.columns) throw std::invalid_argument("x must be [rows, in features]");
    if (activation < 0 || activation > 4) throw std::invalid_argument("activation must be 0 to 4, got " + std::to_string(activation));
    op_.rows = x_.shape(0);
    const int64_t prepared = cpu::quant_prepared_bytes(view);
    weight_.reset(aligned<uint8_t>(prepared));
    cpu::quant_prepare(view, weight_.get());
    cpu::quant_weights(weight_.get(), prepared, op_.weights);
    const QuantWeights& w = op_.weights;
    make_gelu_curve(activation == 3 ? half_tanh : half_erf, curve_);
    codes_.reset(aligned<uint8_t>(cpu::quant_code_bytes(op_)));
    scales_.resize(op_.rows);
    sums_.resize(op_.rows * w.segments);
    float* out = aligned<float>(op_.rows * w.rows);  // as torch aligns its tensors; NumPy's own arrays split lines
    out_ = py::array_t<float>({op_.rows, w.rows}, out, py::capsule(out, std::free));
    op_.x = {x_.data(), op_.rows, 0, w.columns, 1, DType::kF32};
    op_.a = codes_.get();
    op_.a_scale = scales_.data();
    op_.a_sums = w.zeros ? sums_.data() : nullptr;
    op_.together = cpu::quant_linear_items(op_);  // one worker's
    op_.activation = static_cast<Activation>(activation);
    op_.curve = curve_;
    op_.out = out_.mutable_data();
    op_.out_dtype = op_.x.dtype;
    scratch_.reset(aligned<float>(std::max(table_.quant_linear_scratch(op_), w.depth)));
    quantize();
  }

  void quantize() {
    py::gil_scoped_release release;
    for (int64_t item = 0; item * cpu::kQuantizedRows < op_.rows; ++item) table_.quantize_rows(op_, item, scratch_.get());
  }

  py::array run() {
    {
      py::gil_scoped_release release;
      for (int64_t item = 0; item < cpu::quant_linear_items(op_); ++item) table_.quant_linear(op_, item, scratch_.get());
    }
    return out_;
  }

 private:
  template <typename T>
  static T* aligned(int64_t count) {
    void* memory = std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64);
    if (!memory) throw std::bad_alloc();
    return static_cast<T*>(memory);
  }
  template <typename T>
  using Memory = std::unique_ptr<T, decltype(&std::free)>;

  const cpu::Table& table_;
  py::array_t<float, py::array::c_style> x_;
  py::array_t<float> out_;
  Memory<uint8_t> weight_{nullptr, std::free}, codes_{nullptr, std::free};
  Memory<float> scratch_{nullptr, std::free};
  std::vector<float> scales_;
  std::vector<int32_t> sums_;
  float curve_[kGeluCurveFloats];
  QuantLinear op_{};
};

}  // namespace

void add_raw_kernels(py::module_& m) {
  py::class_<KdLossCall>(m, "KdLossCall",
                         "kd_loss of one ISA on one thread: [rows, classes] arrays, no mask, no labels, reduction sum, no T^2.")
      .def(py::init<const std::string&, py::array, py::array, int, float>(), py::arg("isa"), py::arg("student"), py::arg("teacher"),
           py::kw_only(), py::arg("kind") = 0, py::arg("temperature") = 1.0f)
      .def("forward", &KdLossCall::forward, "The loss.")
      .def("backward", &KdLossCall::backward, "The gradient, a view that the next call overwrites; after forward().");
  py::class_<AttentionKlCall>(m, "AttentionKlCall",
                              "attention_kl of one ISA on one thread: [heads, tokens, d] arrays, no mask, reduction sum.")
      .def(py::init<const std::string&, py::array, py::array, py::array, py::array>(), py::arg("isa"), py::arg("q_s"), py::arg("k_s"),
           py::arg("q_t"), py::arg("k_t"))
      .def("run", &AttentionKlCall::run, "(loss, grad_q, grad_k) in one pass; the next call overwrites the gradients.");
  py::class_<QuantLinearCall>(m, "QuantLinearCall",
                              "quant_linear of one ISA on one thread: x [rows, in features] float32, a packed weight, no bias.")
      .def(py::init<const std::string&, py::array_t<float, py::array::c_style>, py::array_t<uint8_t, py::array::c_style>, int>(),
           py::arg("isa"), py::arg("x"), py::arg("packed"), py::kw_only(), py::arg("activation") = 0)
      .def("quantize", &QuantLinearCall::quantize, "The activations to 8 bits, again.")
      .def("run", &QuantLinearCall::run, "The output, which the next call overwrites.");
}

}  // namespace kd::native
