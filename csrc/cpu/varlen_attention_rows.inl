// What all versions of varlen_attention share: items, rows of a head as floats, memory for them, and the end.

constexpr int64_t kKeyBlock = 256;  // keys that pass together
static_assert(kQueryBlock % kRowPad == 0 && kKeyBlock % kPanel == 0);

// Memory taken piece by piece, in whole cache lines.
struct Floats {
  float* memory;
  int64_t taken = 0;

  float* take(int64_t floats) {
    float* begin = memory + taken;
    taken += round_up(floats, 16);
    return begin;
  }
};

// Rows of a head, `width` apart, zeros behind the head and behind the last row. `scratch`: of a row.
inline void copy_head(const TokensView& x, int64_t first, int64_t n, int64_t rows, int64_t head, int64_t size, int64_t width, float* out,
                      float* scratch) {
  for (int64_t r = 0; r < rows; ++r, out += width) {
    if (r < n) {
      const int64_t offset = (first + r) * x.stride_token + head * size * x.stride_column;
      __builtin_memcpy(out, as_floats(x.data, x.dtype, offset, x.stride_column, size, scratch), size * sizeof(float));
    }
    for (int64_t k = r < n ? size : 0; k < width; ++k) out[k] = 0;
  }
}

// The block of queries of one head that an item is: tokens [first, first + queries) of the sequence [begin, end); none behind its end.
struct AttentionItem {
  int64_t head, begin, end, first, queries;

  AttentionItem(const VarlenAttention& op, int64_t item) {
    const int64_t blocks = (op.longest + kQueryBlock - 1) / kQueryBlock, sequence = item / blocks / op.heads;
    head = item / blocks % op.heads;
    begin = op.cu_seqlens[sequence];
    end = op.cu_seqlens[sequence + 1];
    first = begin + item % blocks * kQueryBlock;
    queries = end - first < kQueryBlock ? end - first : kQueryBlock;
  }
};

// Rows of sums, `width` apart, over their totals, to the output.
inline void finish_attention(const VarlenAttention& op, const AttentionItem& item, float* sums, int64_t width, const float* totals) {
  for (int64_t m = 0; m < item.queries; ++m) {
    float* row = sums + m * width;
    const vf over = set1(1.0f / totals[m]);
    for (int64_t k = 0; k < width; k += W) store(row + k, load(row + k) * over);
    from_floats(row, op.size, op.out, op.out_dtype, ((item.first + m) * op.heads + item.head) * op.size);
  }
}
