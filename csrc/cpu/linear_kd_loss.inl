// Sums of rows, a chunk of columns at a time in the L1 cache: how linear_kd_loss joins the products of its panels.

void add_rows(const AddRows& op) {
  alignas(64) float buffer[kKdChunk];
  for (int64_t c = 0; c < op.columns; c += kKdChunk) {
    const int64_t n = op.columns - c < kKdChunk ? op.columns - c : kKdChunk;
    float* out = op.out + c;
    if (!op.keep)
      for (int64_t i = 0; i < n; ++i) out[i] = 0;
    for (int64_t r = 0; r < op.rows; ++r) {
      const float* x = as_floats(op.x, op.dtype, r * op.stride + c, 1, n, buffer);
      int64_t i = 0;
      for (; i + W <= n; i += W) store(out + i, load(out + i) + load(x + i));
      for (; i < n; ++i) out[i] += x[i];
    }
  }
}
