// The blocks of a post-norm encoder for CPU tensors, all in one call, on packed tokens:
//
//   a = LayerNorm(x + W_o attention(W_q x, W_k x, W_v x)),   y = LayerNorm(a + W_down f(W_up a))
//
// A block is nine phases of the other ops' kernels (phases.h). x travels as floats and as 8-bit codes, made when it is normalised, which
// the three projections share. What follows attention passes a chunk of tokens at a time, so that the widest activations stay in cache.
#include <cmath>

#include "encoder.h"
#include "phases.h"
#include "varlen_attention.h"

namespace kd {
namespace {

constexpr int64_t kChunkTokens = 480;  // their widest activations, 3072 floats each, take 6 MB

// Memory for codes of rows, for any of the linears that `fits` has been told of.
class Codes {
 public:
  void fit(const QuantLinear& op, int64_t rows) {
    QuantLinear sized = op;
    sized.rows = rows;
    rows_ = std::max(rows_, rows);
    bytes_ = std::max(bytes_, cpu::quant_code_bytes(sized));
    segments_ = std::max(segments_, op.weights.zeros ? op.weights.segments : 0);
  }
  void allocate(const Tensor& like) {
    codes_ = new_tensor(like, {bytes_}, ScalarType::Byte);
    scales_ = new_tensor(like, {rows_}, ScalarType::Float);
    sums_ = new_tensor(like, {rows_ * segments_}, ScalarType::Int);
  }
  // op on `rows` rows of x whose codes are the ones from `first` on, a multiple of 16. x and out are contiguous.
  QuantLinear bind(QuantLinear op, const float* x, int64_t first, int64_t rows, float* out) const {
    op.rows = rows;
    op.x = {x, rows, 0, op.weights.columns, 1, DType::kF32};
    op.a = static_cast<uint8_t*>(codes_.mutable_data_ptr()) + first * op.weights.depth;
    op.a_scale = static_cast<float*>(scales_.mutable_data_ptr()) + first;
    op.a_sums = op.weights.zeros ? static_cast<int32_t*>(sums_.mutable_data_ptr()) + first * op.weights.segments : nullptr;
    op.out = out;
    op.together = cpu::quant_linear_together(op, torch::stable::get_num_threads());
    return op;
  }

 private:
  int64_t rows_ = 0, bytes_ = 0, segments_ = 0;
  Tensor codes_, scales_, sums_;
};

class Encoder {
 public:
  Encoder(const Tensor& x, const std::vector<EncoderBlock>& blocks, const VarlenAttention& attention)
      : kernels_(table()), tokens_(x.size(0)), features_(x.size(1)), attention_(attention) {
    const int64_t chunks = std::max<int64_t>(1, (tokens_ + kChunkTokens - 1) / kChunkTokens);
    chunk_ = round_up_to((tokens_ + chunks - 1) / chunks, 48);  // whole tiles
    int64_t inner = 0, wide = 0;
    for (const EncoderBlock& block : blocks) {
      inner = std::max(inner, block.qkv[0].weights.rows);
      wide = std::max(wide, block.up.weights.rows);
      hidden_codes_.fit(block.qkv[0], tokens_);
      chunk_codes_.fit(block.output, chunk_);
      chunk_codes_.fit(block.up, chunk_);
      wide_codes_.fit(block.down, chunk_);
      for (QuantLinear op : {block.qkv[0], block.output, block.up, block.down}) {
        op.rows = tokens_;
        scratch_ = std::max({scratch_, kernels_.quant_linear_scratch(op), op.weights.depth});
      }
    }
    scratch_ = std::max(scratch_, kernels_.varlen_attention_scratch(attention_));
    for (Codes* codes : {&hidden_codes_, &chunk_codes_, &wide_codes_}) codes->allocate(x);
    floats_ = new_tensor(x, {3 * tokens_ * inner + chunk_ * (2 * features_ + wide)}, ScalarType::Float);
    projected_[0] = static_cast<float*>(floats_.mutable_data_ptr());
    projected_[1] = projected_[0] + tokens_ * inner;
    projected_[2] = projected_[1] + tokens_ * inner;
    sum_ = projected_[2] + tokens_ * inner;
    attended_ = sum_ + chunk_ * features_;
    wide_ = attended_ + chunk_ * features_;
  }

  void quantize(const EncoderBlock& block, const float* x) { quantize(hidden_codes_.bind(block.qkv[0], x, 0, tokens_, nullptr)); }

  // One block from x, whose codes are there, to y, which may be x; codes of y for `next` unless that is null.
  void add(const EncoderBlock& block, const float* x, float* y, const EncoderBlock* next) {
    project(block, x);
    attend(block);
    for (int64_t first = 0; first < tokens_; first += chunk_) {
      const int64_t rows = std::min(chunk_, tokens_ - first), width = block.output.weights.columns;
      const QuantLinear output = chunk_codes_.bind(block.output, projected_[0] + first * width, 0, rows, sum_);
      const QuantLinear up = chunk_codes_.bind(block.up, attended_, 0, rows, wide_);
      const QuantLinear down = wide_codes_.bind(block.down, wide_, 0, rows, sum_);
      const float* residual = x + first * features_;
      float* result = y + first * features_;
      const NormalizeRows attended = bind(block.attention_norm, residual, rows, attended_);
      const NormalizeRows ended = bind(block.output_norm, attended_, rows, result);
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
      const QuantLinear following = hidden_codes_.bind(next->qkv[0], result, first, rows, nullptr);
      normalize(ended, &following);
    }
  }

  void run() const { phases_.run(scratch_); }

 private:
  // op on the first rows of sum_.
  NormalizeRows bind(NormalizeRows op, const float* residual, int64_t rows, float* out) const {
    op.x = sum_;
    op.residual = residual;
    op.rows = rows;
    op.out = out;
    return op;
  }

  static int64_t row_items(int64_t rows) { return (rows + cpu::kQuantizedRows - 1) / cpu::kQuantizedRows; }

  void quantize(const QuantLinear& op) {
    phases_.add(row_items(op.rows), [this, op](int64_t item, float* scratch) { kernels_.quantize_rows(op, item, scratch); });
  }

  void multiply(const QuantLinear& op) {
    phases_.add(cpu::quant_linear_items(op), [this, op](int64_t item, float* scratch) { kernels_.quant_linear(op, item, scratch); },
                op.together);
  }

  // `next`: which reads the result, in codes; null: none.
  void normalize(const NormalizeRows& op, const QuantLinear* next) {
    if (!next) {
      phases_.add(row_items(op.rows), [this, op](int64_t item, float*) { kernels_.normalize_rows(op, item); });
      return;
    }
    phases_.add(row_items(op.rows), [this, op, next = *next](int64_t item, float* scratch) {
      kernels_.normalize_rows(op, item);
      kernels_.quantize_rows(next, item, scratch);
    });
  }

  void project(const EncoderBlock& block, const float* x) {
    struct Parts {
      QuantLinear op[3];
    } parts;
    for (int i = 0; i < 3; ++i) parts.op[i] = hidden_codes_.bind(block.qkv[i], x, 0, tokens_, projected_[i]);
    const int64_t items = cpu::quant_linear_items(parts.op[0]);
    phases_.add(3 * items, [this, parts, items](int64_t item, float* scratch) {
      kernels_.quant_linear(parts.op[item / items], item % items, scratch);
    }, parts.op[0].together);
  }

  // The context takes the queries' place: an item reads no queries but those whose context it writes.
  void attend(const EncoderBlock& block) {
    VarlenAttention op = attention_;
    const int64_t width = block.qkv[0].weights.rows;
    op.size = width / op.heads;
    op.scale = 1.0f / std::sqrt(static_cast<float>(op.size));
    op.q = {projected_[0], width, 1, DType::kF32};
    op.k = {projected_[1], width, 1, DType::kF32};
    op.v = {projected_[2], width, 1, DType::kF32};
    op.out = projected_[0];
    op.out_dtype = DType::kF32;
    phases_.add(cpu::varlen_attention_items(op),
                [this, op](int64_t item, float* scratch) { kernels_.varlen_attention(op, item, scratch); });
  }

  const cpu::Table& kernels_;
  const int64_t tokens_, features_;
  VarlenAttention attention_;
  int64_t chunk_, scratch_ = 0;
  Codes hidden_codes_, chunk_codes_, wide_codes_;
  Tensor floats_;
  float *projected_[3], *sum_, *attended_, *wide_;
  Phases phases_;
};

Tensor encoder(const Tensor& x, const Tensor& cu_seqlens, std::vector<Tensor> weights, std::vector<Tensor> biases,
               std::vector<Tensor> norms, int64_t num_heads, int64_t activation, double eps, bool all_states,
               std::vector<int64_t> /*layouts: the headers of weights have them*/) {
  const std::vector<EncoderBlock> blocks = encoder_blocks(
      x, weights, biases, norms, num_heads, activation, eps,
      [&](size_t i, int64_t /*columns: the header has them*/, QuantWeights& w) { describe_weights(weights[i], w); });
  const size_t count = blocks.size();
  const int64_t tokens = x.size(0), features = x.size(1), states = all_states ? count : 1;
  VarlenAttention attention{};
  attention.heads = num_heads;
  for (const EncoderBlock& block : blocks) {
    for (const NormalizeRows* norm : {&block.attention_norm, &block.output_norm})
      STD_TORCH_CHECK(norm->dtype == DType::kF32 && norm->norm_dtype == DType::kF32, "x and norms must be float32 on the CPU");
    attention.size = std::max(attention.size, block.qkv[0].weights.rows / num_heads);
  }
  describe_sequences(cu_seqlens, tokens, attention);
  Tensor out = new_tensor(x, {states, tokens, features}, ScalarType::Float);
  const float* from = static_cast<const float*>(x.const_data_ptr());
  float* to = static_cast<float*>(out.mutable_data_ptr());
  if (tokens == 0) return out;
  Encoder encoder(x, blocks, attention);
  encoder.quantize(blocks[0], from);
  for (size_t i = 0; i < count; ++i) {
    encoder.add(blocks[i], from, to, i + 1 < count ? &blocks[i + 1] : nullptr);
    from = to;
    if (all_states) to += tokens * features;
  }
  encoder.run();
  return out;
}

}  // namespace
}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) { m.impl("encoder", TORCH_BOX(&kd::encoder)); }
