// The blocks of a post-norm encoder on packed tokens, from kernels of the other ops:
//
//   a = LayerNorm(x + W_o attention(W_q x, W_k x, W_v x)),   y = LayerNorm(a + W_down f(W_up a))
//
// A block is nine phases. x travels as floats and as 8-bit codes, made when it is normalised, which the three projections share; queries,
// keys, values, their context and the inner activations are bf16: half the bytes, and attention multiplies them as they are. What follows
// attention passes a chunk of tokens at a time, so that the widest activations stay in cache.
#pragma once
#include <cmath>

#include "encoder.h"
#include "phases.h"

namespace kd {

// Contiguous rows of numbers.
struct Rows {
  const void* data;
  int64_t columns;
  DType dtype = DType::kF32;

  void* at(int64_t row) const {
    const int64_t bytes = dtype == DType::kF32 ? 4 : 2;
    return static_cast<char*>(const_cast<void*>(data)) + row * columns * bytes;
  }
  Rows from(int64_t row) const { return {at(row), columns, dtype}; }
};

// Memory handed out piece by piece, in whole cache lines; counted alone where there is none.
class Memory {
 public:
  explicit Memory(void* begin) : begin_(static_cast<char*>(begin)) {}
  template <typename T>
  T* take(int64_t count) {
    T* piece = begin_ ? reinterpret_cast<T*>(begin_ + taken_) : nullptr;
    taken_ += round_up_to(count * sizeof(T), 64);
    return piece;
  }
  int64_t taken() const { return taken_; }

 private:
  char* begin_;
  int64_t taken_ = 0;
};

// Codes of rows, for any of the linears that `fit` has been told of.
class Codes {
 public:
  void fit(const QuantLinear& op, int64_t rows) {
    QuantLinear sized = op;
    sized.rows = rows;
    rows_ = std::max(rows_, rows);
    bytes_ = std::max(bytes_, cpu::quant_code_bytes(sized));
    segments_ = std::max(segments_, op.weights.zeros ? op.weights.segments : 0);
  }
  void take(Memory& memory) {
    codes_ = memory.take<uint8_t>(bytes_);
    scales_ = memory.take<float>(rows_);
    sums_ = memory.take<int32_t>(rows_ * segments_);
  }
  // op on `rows` rows of x whose codes are the ones from `first` on, a multiple of 16.
  QuantLinear bind(QuantLinear op, const Rows& x, int64_t first, int64_t rows, const Rows& out) const {
    op.rows = rows;
    op.x = {x.data, rows, 0, x.columns, 1, x.dtype};
    op.a = codes_ + first * op.weights.depth;
    op.a_scale = scales_ + first;
    op.a_sums = op.weights.zeros ? sums_ + first * op.weights.segments : nullptr;
    op.out = out.at(0);
    op.out_dtype = out.dtype;
    return op;
  }

 private:
  int64_t rows_ = 0, bytes_ = 0, segments_ = 0;
  uint8_t* codes_ = nullptr;
  float* scales_ = nullptr;
  int32_t* sums_ = nullptr;
};

struct Model {
  std::vector<EncoderBlock> blocks;
  int64_t features;
};

// The blocks on some sequences, in memory that all of them share.
class Encoder {
 public:
  // `most`: the tokens of a chunk.
  Encoder(const Model& model, const VarlenAttention& attention, int64_t tokens, int64_t most)
      : kernels_(table()), model_(model), attention_(attention), tokens_(tokens) {
    const int64_t chunks = std::max<int64_t>(1, (tokens_ + most - 1) / most);
    chunk_ = round_up_to((tokens_ + chunks - 1) / chunks, 48);  // whole tiles
    for (const EncoderBlock& block : model.blocks) {
      inner_ = std::max(inner_, block.qkv[0].weights.rows);
      wide_columns_ = std::max(wide_columns_, block.up.weights.rows);
      hidden_codes_.fit(block.qkv[0], tokens_);
      chunk_codes_.fit(block.output, chunk_);
      chunk_codes_.fit(block.up, chunk_);
      wide_codes_.fit(block.down, chunk_);
      for (QuantLinear op : {block.qkv[0], block.output, block.up, block.down}) {
        op.rows = tokens_;
        scratch_floats_ = std::max({scratch_floats_, kernels_.quant_linear_scratch(op), op.weights.depth});
      }
    }
    for (TokensView* x : {&attention_.q, &attention_.k, &attention_.v}) *x = {nullptr, 0, 1, DType::kBF16};
    attention_.out_dtype = DType::kBF16;
    scratch_floats_ = std::max(scratch_floats_, kernels_.varlen_attention_scratch(attention_));
  }

  int64_t scratch_floats() const { return scratch_floats_; }

  // Takes memory; returns how many bytes of it.
  int64_t take(void* begin) {
    Memory memory(begin);
    for (Codes* codes : {&hidden_codes_, &chunk_codes_, &wide_codes_}) codes->take(memory);
    projected_ = memory.take<uint16_t>(3 * tokens_ * inner_);
    wide_ = memory.take<uint16_t>(chunk_ * wide_columns_);
    sum_ = memory.take<float>(chunk_ * model_.features);
    attended_ = memory.take<float>(chunk_ * model_.features);
    return memory.taken();
  }

  // The states behind the blocks from x, `state_stride` floats apart; 0: the last alone. Either in `phases`, or now, with `scratch`.
  void run(const float* x, float* y, int64_t state_stride, Phases* phases, float* scratch) {
    phases_ = phases;
    scratch_ = scratch;
    const std::vector<EncoderBlock>& blocks = model_.blocks;
    quantize(hidden_codes_.bind(blocks[0].qkv[0], {x, model_.features}, 0, tokens_, {}));
    for (size_t i = 0; i < blocks.size(); ++i) {
      add(blocks[i], x, y, i + 1 < blocks.size() ? &blocks[i + 1] : nullptr);
      x = y;
      y += state_stride;
    }
  }

 private:
  static int64_t row_items(int64_t rows) { return (rows + cpu::kQuantizedRows - 1) / cpu::kQuantizedRows; }

  template <typename F>
  void add_phase(int64_t items, const F& run, int64_t together = 1) {
    if (phases_) return phases_->add(items, run, together);
    for (int64_t item = 0; item < items; ++item) run(item, scratch_);
  }

  // One block from x, whose codes are there, to y, which may be x; codes of y for `next` unless that is null.
  void add(const EncoderBlock& block, const float* x, float* y, const EncoderBlock* next) {
    const int64_t features = model_.features;
    project(block, x);
    attend(block);
    for (int64_t first = 0; first < tokens_; first += chunk_) {
      const int64_t rows = std::min(chunk_, tokens_ - first);
      const Rows sum{sum_, features}, wide{wide_, block.up.weights.rows, DType::kBF16};
      const QuantLinear output = chunk_codes_.bind(block.output, projected(block, 0).from(first), 0, rows, sum);
      const QuantLinear up = chunk_codes_.bind(block.up, {attended_, features}, 0, rows, wide);
      const QuantLinear down = wide_codes_.bind(block.down, wide, 0, rows, sum);
      const NormalizeRows attended = normalized(block.attention_norm, x + first * features, rows, attended_);
      const NormalizeRows ended = normalized(block.output_norm, attended_, rows, y + first * features);
      quantize(output);
      multiply(output);
      normalize(attended, &up);
      multiply(up);
      quantize(down);
      multiply(down);
      if (!next) {
        normalize(ended, nullptr);
        continue;
      }
      const QuantLinear following = hidden_codes_.bind(next->qkv[0], {y + first * features, features}, first, rows, {});
      normalize(ended, &following);
    }
  }

  void quantize(const QuantLinear& op) {
    add_phase(row_items(op.rows), [this, op](int64_t item, float* scratch) { kernels_.quantize_rows(op, item, scratch); },
              cpu::kQuantizedTogether);
  }

  // How many neighbours a worker takes in turn.
  int64_t together(const QuantLinear& op) const {
    return phases_ ? cpu::quant_linear_together(op, torch::stable::get_num_threads()) : cpu::quant_linear_items(op);
  }

  void multiply(QuantLinear op) {
    op.together = together(op);
    add_phase(cpu::quant_linear_items(op), [this, op](int64_t item, float* scratch) { kernels_.quant_linear(op, item, scratch); },
              op.together);
  }

  // The norm of the sums and a residual.
  NormalizeRows normalized(NormalizeRows op, const float* residual, int64_t rows, float* out) const {
    op.x = sum_;
    op.residual = residual;
    op.rows = rows;
    op.out = out;
    return op;
  }

  // `next`: which reads the result, in codes; null: none.
  void normalize(const NormalizeRows& op, const QuantLinear* next) {
    if (!next) {
      add_phase(row_items(op.rows), [this, op](int64_t item, float*) { kernels_.normalize_rows(op, item); }, cpu::kQuantizedTogether);
      return;
    }
    add_phase(row_items(op.rows), [this, op, next = *next](int64_t item, float* scratch) {
      kernels_.normalize_rows(op, item);
      kernels_.quantize_rows(next, item, scratch);
    }, cpu::kQuantizedTogether);
  }

  // Queries, keys or values.
  Rows projected(const EncoderBlock& block, int64_t part) const {
    const int64_t width = block.qkv[0].weights.rows;
    return {projected_ + part * tokens_ * width, width, DType::kBF16};
  }

  void project(const EncoderBlock& block, const float* x) {
    struct Parts {
      QuantLinear op[3];
    } parts;
    for (int i = 0; i < 3; ++i) {
      parts.op[i] = hidden_codes_.bind(block.qkv[i], {x, model_.features}, 0, tokens_, projected(block, i));
      parts.op[i].together = together(parts.op[i]);
    }
    const int64_t items = cpu::quant_linear_items(parts.op[0]);
    add_phase(3 * items, [this, parts, items](int64_t item, float* scratch) {
      kernels_.quant_linear(parts.op[item / items], item % items, scratch);
    }, parts.op[0].together);
  }

  // The context takes the queries' place: an item reads no queries but those whose context it writes.
  void attend(const EncoderBlock& block) {
    VarlenAttention op = attention_;
    const int64_t width = block.qkv[0].weights.rows;
    op.size = width / op.heads;
    op.scale = 1.0f / std::sqrt(static_cast<float>(op.size));
    TokensView* views[] = {&op.q, &op.k, &op.v};
    for (int64_t part = 0; part < 3; ++part) {
      views[part]->data = projected(block, part).data;
      views[part]->stride_token = width;
    }
    op.out = projected(block, 0).at(0);
    add_phase(cpu::varlen_attention_items(op),
              [this, op](int64_t item, float* scratch) { kernels_.varlen_attention(op, item, scratch); });
  }

  const cpu::Table& kernels_;
  const Model& model_;
  VarlenAttention attention_;
  const int64_t tokens_;
  int64_t chunk_, inner_ = 0, wide_columns_ = 0, scratch_floats_ = 0;
  Codes hidden_codes_, chunk_codes_, wide_codes_;
  uint16_t *projected_, *wide_;
  float *sum_, *attended_, *scratch_;
  Phases* phases_;
};

}  // namespace kd
