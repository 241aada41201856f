// The two products of varlen_attention with FMAs, in fp32.
//
// A block's keys, turned, and values are copied side by side: where they come from, a token's rows lie a multiple of the page's size
// apart, and compete for few lines of the first-level cache.

constexpr int64_t kScoreRows = kRowPad, kScoreColumns = W;  // queries and keys are padded to these

struct AttentionBuffers {
  float *q, *keys, *values, *scores, *out, *row, *largest, *total;
  int64_t size, width;  // of a head; in whole vectors
};

// Lays them out in `scratch` and returns how many floats they take.
inline int64_t lay_out_attention(const VarlenAttention& op, float* scratch, AttentionBuffers& b) {
  Floats memory{scratch};
  b.size = op.size;
  b.width = round_up(op.size, W);
  b.q = memory.take(kQueryBlock * b.width);
  b.keys = memory.take(kKeyBlock * b.width);
  b.values = memory.take(kKeyBlock * b.width);
  b.scores = memory.take(kQueryBlock * kKeyBlock);
  b.out = memory.take(kQueryBlock * b.width);
  b.row = memory.take(b.width);
  b.largest = memory.take(kQueryBlock);
  b.total = memory.take(kQueryBlock);
  return memory.taken;
}

inline void pack_queries(const VarlenAttention& op, const AttentionBuffers& b, int64_t first, int64_t n, int64_t rows, int64_t head) {
  copy_head(op.q, first, n, rows, head, b.size, b.width, b.q, b.row);
}

inline void pack_keys(const VarlenAttention& op, const AttentionBuffers& b, int64_t first, int64_t n, int64_t columns, int64_t head) {
  copy_head(op.k, first, n, columns, head, b.size, b.width, b.values, b.row);
  for (int64_t k = 0; k < columns; k += kPanel)
    transpose(b.values + k * b.width, b.width, columns - k < kPanel ? columns - k : kPanel, b.width, b.keys + k * b.width, kPanel);
}

inline void pack_values(const VarlenAttention& op, const AttentionBuffers& b, int64_t first, int64_t n, int64_t columns, int64_t head) {
  copy_head(op.v, first, n, columns, head, b.size, b.width, b.values, b.row);
}

inline void multiply_keys(const AttentionBuffers& b, int64_t rows, int64_t columns) {
  gemm<false>(rows, columns, b.size, b.q, b.width, 1, b.keys, kPanel, kPanel * b.width, b.scores, kKeyBlock);
}

// out += exponentials times values; columns without a key are 0 in both.
inline void multiply_values(const AttentionBuffers& b, int64_t rows, int64_t columns) {
  gemm<true>(rows, b.width, columns, b.scores, kKeyBlock, 1, b.values, b.width, kPanel, b.out, b.width);
}

inline bool leave_to_fmas(const VarlenAttention&, const AttentionBuffers&, int64_t, int64_t, float*) { return false; }
