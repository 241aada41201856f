// The blocks of a post-norm encoder on packed tokens, nine kernels each:
//
//   q, k, v = W x         one launch            codes = quantise(context)     sum = W_o codes       a = LayerNorm(sum + x), its codes
//   context = attention   in q's place          codes = quantise(f(W_up a))   sum = W_down codes    y = LayerNorm(sum + a), its codes
//
// x travels as values and as 8-bit codes, made when it is normalised, which the three projections share.
#include "encoder.h"

#include <cmath>

#include "normalize_rows.h"
#include "quant_linear.h"
#include "varlen_attention.h"

namespace kd::cuda {
namespace {

struct Codes {
  uint8_t* codes;
  float* scales;
  int32_t* sums;
};

// Widest rows of any block.
struct Widths {
  int64_t heads = 0, inner = 0;
  int64_t hidden_depth = 0, other_depth = 0, segments = 0;  // of codes: of x and a, of the rest; of sums

  explicit Widths(const Encoder& op) {
    const auto most = [](int64_t& width, int64_t other) { width = width < other ? other : width; };
    for (int64_t i = 0; i < op.count; ++i) {
      const EncoderBlock& block = op.blocks[i];
      most(heads, block.output.weights.columns);
      most(inner, block.down.weights.columns);
      most(hidden_depth, block.up.weights.depth);
      most(other_depth, block.output.weights.depth);
      most(other_depth, block.down.weights.depth);
      most(segments, block.qkv[0].weights.segments);
      most(segments, block.output.weights.segments);
      most(segments, block.up.weights.segments);
      most(segments, block.down.weights.segments);
    }
  }
};

struct Workspace {
  uint8_t *projected[3], *inner;  // the latter in the former's place
  uint8_t *sum, *attended;
  Codes hidden, other;  // of x and a; of context and f(W_up a)
  int64_t bytes = 0;

  Workspace(const Encoder& op, void* base) {
    const Widths widths(op);
    const auto section = [&](int64_t bytes_of_row) {
      uint8_t* begin = static_cast<uint8_t*>(base) + bytes;
      bytes += packed_round_up(op.rows * bytes_of_row, kPackedAlign);
      return begin;
    };
    const int64_t element = op.dtype == DType::kF32 ? 4 : 2;
    for (uint8_t*& part : projected) part = section(widths.heads * element);
    inner = projected[0];
    if (widths.inner > 3 * widths.heads) section((widths.inner - 3 * widths.heads) * element);
    sum = section(op.features * element);
    attended = section(op.features * element);
    const auto codes = [&](int64_t depth) {
      return Codes{section(depth), reinterpret_cast<float*>(section(sizeof(float))),
                   reinterpret_cast<int32_t*>(section(widths.segments * sizeof(int32_t)))};
    };
    hidden = codes(widths.hidden_depth);
    other = codes(widths.other_depth);
  }
};

class Run {
 public:
  Run(const Encoder& op, void* workspace, void* stream)
      : op_(op), in_use_(op.attention.cu_seqlens + op.attention.sequences), at_(op, workspace), stream_(stream) {}

  // Codes of x for the first block.
  int begin() const { return quantize_rows(bind(op_.blocks[0].qkv[0], op_.x, at_.hidden, nullptr), stream_); }

  // One block from x, whose codes are there, to y, which may be x; codes of y for `next` unless that is null.
  int add(const EncoderBlock& block, const void* x, void* y, const EncoderBlock* next) const {
    QuantLinear qkv[3];
    for (int i = 0; i < 3; ++i) qkv[i] = bind(block.qkv[i], x, at_.hidden, at_.projected[i]);
    const QuantLinear output = bind(block.output, at_.projected[0], at_.other, at_.sum);
    const QuantLinear up = bind(block.up, at_.attended, at_.hidden, at_.inner);
    const QuantLinear down = bind(block.down, at_.inner, at_.other, at_.sum);
    const NormalizeRows attended = bind(block.attention_norm, x, at_.attended), ended = bind(block.output_norm, at_.attended, y);
    const QuantLinear following = next != nullptr ? bind(next->qkv[0], y, at_.hidden, nullptr) : QuantLinear{};
    if (const int status = quant_linear(qkv, 3, stream_)) return status;
    if (const int status = varlen_attention(attention(block), stream_)) return status;
    if (const int status = quantize_rows(output, stream_)) return status;
    if (const int status = quant_linear(output, stream_)) return status;
    if (const int status = normalize_rows(attended, &up, stream_)) return status;
    if (const int status = quant_linear(up, stream_)) return status;
    if (const int status = quantize_rows(down, stream_)) return status;
    if (const int status = quant_linear(down, stream_)) return status;
    return normalize_rows(ended, next != nullptr ? &following : nullptr, stream_);
  }

 private:
  QuantLinear bind(QuantLinear op, const void* x, const Codes& codes, void* out) const {
    op.x = {x, op_.rows, 0, op.weights.columns, 1, op_.dtype};
    op.rows = op_.rows;
    op.in_use = in_use_;
    op.a = codes.codes;
    op.a_scale = codes.scales;
    op.a_sums = op.weights.zeros != nullptr ? codes.sums : nullptr;
    op.out = out;
    return op;
  }

  NormalizeRows bind(NormalizeRows op, const void* residual, void* out) const {
    op.x = at_.sum;
    op.residual = residual;
    op.rows = op_.rows;
    op.in_use = in_use_;
    op.out = out;
    return op;
  }

  VarlenAttention attention(const EncoderBlock& block) const {
    const int64_t width = block.output.weights.columns;
    const auto view = [&](int i) { return TokensView{at_.projected[i], width, 1, op_.dtype}; };
    VarlenAttention op = op_.attention;
    op.q = view(0);
    op.k = view(1);
    op.v = view(2);
    op.tokens = op_.rows;
    op.size = width / op.heads;
    op.scale = 1.0f / std::sqrt(static_cast<float>(op.size));
    op.out = at_.projected[0];
    op.out_dtype = op_.dtype;
    return op;
  }

  const Encoder& op_;
  const int32_t* in_use_;
  const Workspace at_;
  void* stream_;
};

}  // namespace

int64_t encoder_workspace_bytes(const Encoder& op) { return Workspace(op, nullptr).bytes; }

int encoder(const Encoder& op, void* workspace, void* stream) {
  if (op.rows == 0) return 0;
  const Run run(op, workspace, stream);
  const int64_t state = op.rows * op.features * (op.dtype == DType::kF32 ? 4 : 2);
  const void* from = op.x;
  uint8_t* to = static_cast<uint8_t*>(op.out);
  int status = run.begin();
  for (int64_t i = 0; i < op.count && status == 0; ++i) {
    status = run.add(op.blocks[i], from, to, i + 1 < op.count ? &op.blocks[i + 1] : nullptr);
    from = to;
    if (op.all_states) to += state;
  }
  return status;
}

}  // namespace kd::cuda
