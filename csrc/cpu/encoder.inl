// normalize_rows: out = (y - mean) / sqrt(var + eps) * weight + bias with y = x + residual. The variance is that of the differences, for
// which a row passes once more through the first-level cache.

// The sum of f(position, valid lanes), which is 0 in lanes that are not valid, over n elements; in four chains.
template <typename F>
inline float sum_over(int64_t n, const F& f) {
  vf total[4] = {};
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W)
    for (int j = 0; j < 4; ++j) total[j] += f(i + j * W, W);
  for (; i < n; i += W) total[0] += f(i, n - i < W ? n - i : W);
  return sum((total[0] + total[1]) + (total[2] + total[3]));
}

inline void normalize_row(const NormalizeRows& op, int64_t row) {
  const int64_t n = op.columns;
  const float* x = static_cast<const float*>(op.x) + row * n;
  const float* residual = static_cast<const float*>(op.residual) + row * n;
  const float *weight = static_cast<const float*>(op.weight), *bias = static_cast<const float*>(op.bias);
  float* out = static_cast<float*>(op.out) + row * n;
  const float mean = sum_over(n, [&](int64_t i, int64_t lanes) {
    const vf y = load_up_to(x + i, lanes, 0) + load_up_to(residual + i, lanes, 0);
    store_up_to(out + i, y, lanes);
    return y;
  }) / static_cast<float>(n);
  const float squares = sum_over(n, [&](int64_t i, int64_t lanes) {
    const vf off = load_up_to(out + i, lanes, mean) - mean;
    return off * off;
  });
  const float variance = squares / static_cast<float>(n);
  const vf over = set1(1.0f / __builtin_sqrtf(variance + op.eps));
  for_vectors(n, [&](int64_t i, int64_t lanes) {
    const vf y = (load_up_to(out + i, lanes, 0) - mean) * over;
    store_up_to(out + i, fma(y, load_up_to(weight + i, lanes, 0), load_up_to(bias + i, lanes, 0)), lanes);
  });
}

// One item = kQuantizedRows rows.
void normalize_rows(const NormalizeRows& op, int64_t item) {
  const int64_t first = item * kQuantizedRows, end = first + kQuantizedRows < op.rows ? first + kQuantizedRows : op.rows;
  for (int64_t row = first; row < end; ++row) normalize_row(op, row);
}
