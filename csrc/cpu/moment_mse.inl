// moment_mse: sum over real tokens of mean_weight (m_s - m_t)^2 + variance_weight |v_s - v_t|, m and v a row's mean and variance.
//
// With x = s - a first guess of m_s, and d = (s - t) - a first guess of m_s - m_t,
//   m_s - m_t = its guess + mean(d),   v_s - v_t = mean(d (2 x - d)) - mean(d) mean(2 x - d)
// so that s - t, which is exact near the teacher, is made before anything is rounded or summed: a student there keeps its digits, and with
// them the sign of the variance's gradient. Equal rows give exactly 0.
//
//   gradient = a + b (s - m_s),   a = 2 mean_weight (m_s - m_t) / n,   b = 2 variance_weight sign(v_s - v_t) / n
//
// (2 (v_s - v_t) for the sign where the variances' difference is squared), written around the guess of m_s, which is a float. Floor: two
// reads forward; one read and one write backward, which needs three numbers a row of forward's and no teacher.

inline float* moment_stats(const MomentMse& op, const HiddenLayer& layer) {
  return op.stats + (&layer - op.layers) * op.batch * op.tokens * 3;
}

void moment_forward(const MomentMse& op, int64_t item, float* scratch) {
  const HiddenBlock block = hidden_block(op, item);
  const HiddenLayer& layer = block.layer;
  const int64_t n = layer.features;
  float *row_s = scratch, *row_t = scratch + hidden_row_floats(n);
  double total = 0;
  float* stats = op.stats ? moment_stats(op, layer) : nullptr;
  hidden_with_type(layer, [&]<typename T>() {
    for (int64_t token = block.begin; token < block.end; ++token) {
      float unused[3];
      float* left = stats ? stats + token * 3 : unused;
      if (op.mask && !op.mask[token]) {
        left[0] = left[1] = left[2] = 0;
        continue;
      }
      const T* s = hidden_row<T>(layer.student, op.tokens, token, n, row_s);
      const T* t = hidden_row<T>(layer.teacher, op.tokens, token, n, row_t);
      const int64_t ahead_s = hidden_ahead(s, row_s, n), ahead_t = hidden_ahead(t, row_t, n);
      double sums[3];
      hidden_sums<2>(n, [&](int64_t i, int64_t lanes, vf* add) {
        __builtin_prefetch(s + i + ahead_s);
        __builtin_prefetch(t + i + ahead_t);
        add[0] += load_up_to(s + i, lanes, 0);
        add[1] += load_up_to(t + i, lanes, 0);
      }, sums);
      const float guess = static_cast<float>(sums[0] / n), guess_t = static_cast<float>(sums[1] / n), gap = guess - guess_t;
      hidden_sums<3>(n, [&](int64_t i, int64_t lanes, vf* add) {
        const vf at = load_up_to(s + i, lanes, guess), x = at - guess, d = (at - load_up_to(t + i, lanes, guess_t)) - gap;
        add[0] += x;
        add[1] += d;
        add[2] = fma(d, (x + x) - d, add[2]);
      }, sums);
      const double rest = sums[0] / n, apart = sums[1] / n, mean = gap + apart;
      const double variance = sums[2] / n - apart * (2 * rest - apart), sign = (variance > 0) - (variance < 0);
      const bool squared = op.variance == kSquared;
      total += op.mean_weight * (mean * mean) + op.variance_weight * (squared ? variance * variance : sign * variance);
      const double slope = 2 * op.variance_weight * (squared ? 2 * variance : sign) / n;
      left[0] = guess;
      left[1] = static_cast<float>(2 * op.mean_weight * mean / n - slope * rest);
      left[2] = static_cast<float>(slope);
    }
  });
  op.partial[item] = total;
}

void moment_backward(const MomentMse& op, int64_t item, float* scratch) {
  const HiddenBlock block = hidden_block(op, item);
  const HiddenLayer& layer = block.layer;
  const float coef = *op.upstream * layer.grad_weight;
  const float* stats = moment_stats(op, layer);
  hidden_with_type(layer, [&]<typename T>() {
    for (int64_t token = block.begin; token < block.end; ++token) {
      if (op.mask && !op.mask[token]) {
        hidden_no_gradient(op, layer, token);
        continue;
      }
      const T* s = hidden_row<T>(layer.student, op.tokens, token, layer.features, scratch);
      const float mean = stats[token * 3];
      const vf a = set1(stats[token * 3 + 1]), b = set1(stats[token * 3 + 2]);
      hidden_put_gradient<T>(op, layer, token, scratch,
                               [&](int64_t i, int64_t lanes) { return coef * fma(b, load_up_to(s + i, lanes, 0) - mean, a); });
    }
  });
  stream_end();
}
