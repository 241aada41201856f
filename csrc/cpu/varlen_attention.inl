// varlen_attention: softmax(scale q k^T) v of one block of queries, in memory that does not grow with the sequence.
//
// Keys pass in blocks. What earlier blocks left, the sum of exponentials and of their products with v, is scaled down when a larger score
// comes (the online softmax); at the end one division per row remains. Scores stay q k^T until the exponential multiplies them by
// scale * log2(e) without rounding the product. A block's keys, turned, and values are copied side by side: where they come from, a
// token's rows lie a multiple of the page's size apart, and compete for few lines of the first-level cache.
//
// A NaN or an infinite score makes its row NaN, as in torch. The running maximum starts at the lowest finite number, so that a first
// block of -inf alone leaves zeros that later blocks may add to.

constexpr int64_t kKeyBlock = 256;
static_assert(kQueryBlock % kRowPad == 0 && kKeyBlock % kPanel == 0);

struct AttentionBuffers {
  float *q, *keys, *values, *scores, *out, *row, *largest, *total;
  int64_t width;  // of a head, in whole vectors

  // Lays them out in `scratch` and returns how many floats they take.
  static int64_t lay_out(const VarlenAttention& op, float* scratch, AttentionBuffers& b) {
    int64_t at = 0;
    const auto take = [&](int64_t floats) {
      float* begin = scratch + at;
      at += round_up(floats, 16);
      return begin;
    };
    b.width = round_up(op.size, W);
    b.q = take(kQueryBlock * op.size);
    b.keys = take(kKeyBlock * b.width);
    b.values = take(kKeyBlock * b.width);
    b.scores = take(kQueryBlock * kKeyBlock);
    b.out = take(kQueryBlock * b.width);
    b.row = take(b.width);
    b.largest = take(kQueryBlock);
    b.total = take(kQueryBlock);
    return at;
  }
};

int64_t varlen_attention_scratch(const VarlenAttention& op) {
  AttentionBuffers b;
  return AttentionBuffers::lay_out(op, nullptr, b);
}

inline const float* token_row(const TokensView& x, int64_t token, int64_t head, int64_t size, float* scratch) {
  return as_floats(x.data, x.dtype, token * x.stride_token + head * size * x.stride_column, x.stride_column, size, scratch);
}

// Rows of a head, `width` apart, zeros behind the head and behind the last row.
inline void copy_head(const TokensView& x, int64_t first, int64_t n, int64_t rows, int64_t head, int64_t size, int64_t width, float* out,
                      float* scratch) {
  for (int64_t r = 0; r < rows; ++r, out += width) {
    if (r < n) __builtin_memcpy(out, token_row(x, first + r, head, size, scratch), size * sizeof(float));
    for (int64_t k = r < n ? size : 0; k < width; ++k) out[k] = 0;
  }
}

// Scores of a block of keys to exponentials, in place, with zeros behind the last key; brings what is in `out` to the same maximum.
inline void softmax_block(const AttentionBuffers& b, int64_t queries, int64_t keys, float scale) {
  const vf times = set1(scale * kLog2E);
  for (int64_t m = 0; m < queries; ++m) {
    float *row = b.scores + m * kKeyBlock, *out = b.out + m * b.width;
    vf most = set1(b.largest[m]);
    for_vectors(keys, [&](int64_t i, int64_t lanes) { most = vmax(load_up_to(row + i, lanes, -__FLT_MAX__), most); });
    const float largest = max(most);
    vf total{};
    for_vectors(keys, [&](int64_t i, int64_t lanes) {
      const vf p = exp2_scaled(load_up_to(row + i, lanes, -__builtin_inff()) - largest, times);
      total += p;
      store(row + i, p);
    });
    const vf before = exp2_scaled(set1(b.largest[m] - largest), times);
    b.total[m] = b.total[m] * before[0] + sum(total);
    b.largest[m] = largest;
    for (int64_t k = 0; k < b.width; k += W) store(out + k, load(out + k) * before);
  }
}

void varlen_attention(const VarlenAttention& op, int64_t item, float* scratch) {
  const int64_t blocks = (op.longest + kQueryBlock - 1) / kQueryBlock;
  const int64_t head = item / blocks % op.heads, sequence = item / blocks / op.heads;
  const int64_t begin = op.cu_seqlens[sequence], end = op.cu_seqlens[sequence + 1], first = begin + item % blocks * kQueryBlock;
  if (first >= end) return;
  AttentionBuffers b;
  AttentionBuffers::lay_out(op, scratch, b);
  const int64_t queries = end - first < kQueryBlock ? end - first : kQueryBlock, rows = round_up(queries, kRowPad);
  copy_head(op.q, first, queries, rows, head, op.size, op.size, b.q, b.row);
  for (int64_t m = 0; m < queries; ++m) {
    b.largest[m] = -__FLT_MAX__;
    b.total[m] = 0;
  }
  for (int64_t i = 0; i < rows * b.width; ++i) b.out[i] = 0;
  for (int64_t key = begin; key < end; key += kKeyBlock) {
    const int64_t keys = end - key < kKeyBlock ? end - key : kKeyBlock, columns = round_up(keys, W);
    copy_head(op.k, key, keys, columns, head, op.size, b.width, b.values, b.row);
    for (int64_t n = 0; n < columns; n += kPanel)
      transpose(b.values + n * b.width, b.width, columns - n < kPanel ? columns - n : kPanel, b.width, b.keys + n * b.width, kPanel);
    gemm<false>(rows, columns, op.size, b.q, op.size, 1, b.keys, kPanel, kPanel * b.width, b.scores, kKeyBlock);
    softmax_block(b, queries, keys, op.scale);
    copy_head(op.v, key, keys, keys, head, op.size, b.width, b.values, b.row);
    gemm<true>(rows, b.width, keys, b.scores, kKeyBlock, 1, b.values, b.width, kPanel, b.out, b.width);
  }
  for (int64_t m = 0; m < queries; ++m) {
    float* row = b.out + m * b.width;
    const vf over = set1(1.0f / b.total[m]);
    for (int64_t k = 0; k < b.width; k += W) store(row + k, load(row + k) * over);
    from_floats(row, op.size, op.out, op.out_dtype, ((first + m) * op.heads + head) * op.size);
  }
}
