// hidden_cosine: sum of 1 - cos(s, t) over real tokens, as half of |u - v|^2 + (1 - |u|^2) + (1 - |v|^2), u = s / max(|s|, eps) and v
// likewise, so that equal rows give exactly 0. The last two terms are 0 unless a row is shorter than eps.
//
//   gradient = (u cos - v) / |s|, and -v / eps where s is shorter than eps
//
// Floor: two reads, and one write for the gradient; a row is in the L1 cache when it is read again. Forward leaves a float32 gradient,
// for an upstream of 1, and backward scales it in place, in half the time of reading both states again. One of 16 bits would be rounded
// twice: backward makes it, from the states.

constexpr double kCosineEps = 1e-8;

// What divides a row, and what is missing to 1 in the square of the divided row.
struct CosineNorm {
  float scale;
  double missing;
};

inline CosineNorm cosine_norm(double square) {
  const double norm = __builtin_sqrt(square);
  if (norm < kCosineEps) return {static_cast<float>(1 / kCosineEps), 1 - square / (kCosineEps * kCosineEps)};
  return {static_cast<float>(1 / norm), 0};
}

struct CosineRow {
  CosineNorm s, t;
  double loss;
};

// row_s and row_t: where copies lie.
template <typename T>
inline CosineRow cosine_row(const T* s, const T* t, int64_t n, const float* row_s, const float* row_t) {
  const int64_t ahead_s = hidden_ahead(s, row_s, n), ahead_t = hidden_ahead(t, row_t, n);
  double squares[3];
  hidden_sums<3>(n, [&](int64_t i, int64_t lanes, vf* sums) {
    __builtin_prefetch(s + i + ahead_s);
    __builtin_prefetch(t + i + ahead_t);
    const vf a = load_up_to(s + i, lanes, 0), b = load_up_to(t + i, lanes, 0);
    sums[0] = fma(a, a, sums[0]);
    sums[1] = fma(b, b, sums[1]);
    sums[2] = fma(a, b, sums[2]);
  }, squares);
  CosineRow row{cosine_norm(squares[0]), cosine_norm(squares[1]), 0};
  const double cosine = squares[2] * row.s.scale * row.t.scale;
  if (cosine < 0.5) {  // no digits of 1 - cos are lost, and one walk is enough
    row.loss = 1 - cosine;
    return row;
  }
  const double distance = hidden_sum(n, [&](int64_t i, int64_t lanes) {
    const vf d = load_up_to(s + i, lanes, 0) * row.s.scale - load_up_to(t + i, lanes, 0) * row.t.scale;
    return d * d;
  });
  row.loss = 0.5 * (distance + row.s.missing + row.t.missing);
  return row;
}

// The losses' sum where op.partial is, the gradients where the layer has memory for them.
void hidden_cosine(const HiddenLayers& op, int64_t item, float* scratch) {
  const HiddenBlock block = hidden_block(op, item);
  const HiddenLayer& layer = block.layer;
  const int64_t n = layer.features;
  float *row_s = scratch, *row_t = scratch + hidden_row_floats(n);
  double total = 0;
  hidden_with_type(layer, [&]<typename T>() {
    for (int64_t token = block.begin; token < block.end; ++token) {
      if (op.mask && !op.mask[token]) {
        if (layer.grad_student) hidden_no_gradient(op, layer, token);
        continue;
      }
      const T* s = hidden_row<T>(layer.student, op.tokens, token, n, row_s);
      const T* t = hidden_row<T>(layer.teacher, op.tokens, token, n, row_t);
      const CosineRow row = cosine_row(s, t, n, row_s, row_t);
      total += row.loss;
      if (!layer.grad_student) continue;
      const vf a = set1(row.s.missing > 0 ? 0 : static_cast<float>(row.s.scale * (1 - row.loss))), b = set1(row.t.scale);
      const vf scale = set1(layer.grad_weight * row.s.scale), upstream = set1(*op.upstream);  // last, as where it comes later
      hidden_put_gradient<T>(op, layer, token, row_s, [&](int64_t i, int64_t lanes) {
        return upstream * (scale * (load_up_to(s + i, lanes, 0) * a - load_up_to(t + i, lanes, 0) * b));
      });
    }
  });
  if (op.partial) op.partial[item] = total;
  stream_end();
}
