// hidden_mse without a projection: sum |y_s - y_t|^2 over real tokens, y = x, x / max(|x|, eps) or (x - mean) / sqrt(var + eps).
//
// Floor: two reads forward; two reads and one write backward, which recomputes, so nothing is saved. Padded tokens are not read;
// their gradient is written as 0. A normalised row is worked on while it is in the L1 cache, so it costs no more memory traffic.
// Student and teacher go through the same instructions: equal rows give exactly 0.

constexpr float kHiddenEps = 1e-12f;

template <typename T>
inline double hidden_squares(const T* x, const T* y, int64_t n) {
  return hidden_sum(n, [&](int64_t i, int64_t lanes) {
    const vf difference = load_up_to(x + i, lanes, 0) - load_up_to(y + i, lanes, 0);
    return difference * difference;
  });
}

// What a row was multiplied by, and whether that depends on the row (the norm of an l2 row below eps does not count).
struct HiddenScale {
  float scale;
  bool of_row;
};

// y = x / max(|x|, eps), divided by multiplying and correcting once: a row of one feature is exactly 1 or -1.
inline HiddenScale hidden_l2(const float* x, int64_t n, float* y) {
  const double norm = __builtin_sqrt(hidden_sum(n, [&](int64_t i, int64_t lanes) {
    const vf v = load_up_to(x + i, lanes, 0);
    return v * v;
  }));
  const bool of_row = !(norm < kHiddenEps);
  const float divisor = of_row ? static_cast<float>(norm) : kHiddenEps, scale = 1 / divisor;
  const vf vscale = set1(scale), minus_divisor = set1(-divisor);
  for_vectors(n, [&](int64_t i, int64_t lanes) {
    const vf v = load_up_to(x + i, lanes, 0), about = v * vscale;
    store_up_to(y + i, fma(fma(about, minus_divisor, v), vscale, about), lanes);
  });
  return {scale, of_row};
}

// y = (x - mean) / sqrt(var + eps). The mean is a float and what that float lacks of it, so that a constant row, whose variance of 0
// makes the scale 10^6, is still 0 and a large mean does not blur a small variance.
inline HiddenScale hidden_layer_norm(const float* x, int64_t n, float* y) {
  const double about = hidden_sum(n, [&](int64_t i, int64_t lanes) { return load_up_to(x + i, lanes, 0); }) / n;
  const float mean = static_cast<float>(about);
  const auto centred = [&](int64_t i, int64_t lanes) { return load_up_to(x + i, lanes, mean) - mean; };
  const double rest = hidden_sum(n, centred) / n;
  const double square = hidden_sum(n, [&](int64_t i, int64_t lanes) {
    const vf v = centred(i, lanes);
    return v * v;
  }) / n;
  const double variance = square > rest * rest ? square - rest * rest : square - square;  // 0, or NaN if the row has one
  const float scale = static_cast<float>(1 / __builtin_sqrt(variance + kHiddenEps));
  const vf low = set1(static_cast<float>(rest));
  for_vectors(n, [&](int64_t i, int64_t lanes) { store_up_to(y + i, (centred(i, lanes) - low) * scale, lanes); });
  return {scale, true};
}

inline HiddenScale hidden_normalize(Normalize normalize, const float* x, int64_t n, float* y) {
  return normalize == kL2 ? hidden_l2(x, n, y) : hidden_layer_norm(x, n, y);
}

// g = coef (y_s - y_t), taken back through the normalisation that gave y_s. g may be y_s or y_t.
inline void hidden_gradient(Normalize normalize, HiddenScale s, const float* ys, const float* yt, int64_t n, float coef, float* g) {
  const auto difference = [&](int64_t i, int64_t lanes) { return load_up_to(ys + i, lanes, 0) - load_up_to(yt + i, lanes, 0); };
  if (normalize == kNoNormalize)
    return for_vectors(n, [&](int64_t i, int64_t lanes) { store_up_to(g + i, coef * difference(i, lanes), lanes); });
  double mean = 0, along = 0;  // what the normalisation takes out of the gradient: its parts along 1 and along y
  if (s.of_row) along = hidden_sum(n, [&](int64_t i, int64_t lanes) { return difference(i, lanes) * load_up_to(ys + i, lanes, 0); });
  if (normalize == kLayerNorm) {
    along /= n;
    mean = hidden_sum(n, difference) / n;
  }
  const vf scale = set1(coef * s.scale), vmean = set1(static_cast<float>(mean)), minus_along = set1(static_cast<float>(-along));
  for_vectors(n, [&](int64_t i, int64_t lanes) {
    store_up_to(g + i, scale * fma(minus_along, load_up_to(ys + i, lanes, 0), difference(i, lanes) - vmean), lanes);
  });
}

// Rows that are normalised are floats.
template <typename F>
inline void hidden_mse_with_type(const HiddenMse& op, const HiddenLayer& layer, const F& f) {
  op.normalize == kNoNormalize ? hidden_with_type(layer, f) : f.template operator()<float>();
}

void hidden_forward(const HiddenMse& op, int64_t item, float* scratch) {
  const HiddenBlock block = hidden_block(op, item);
  const HiddenLayer& layer = block.layer;
  const int64_t n = layer.features;
  float *row_s = scratch, *row_t = scratch + hidden_row_floats(n);
  double total = 0;
  hidden_mse_with_type(op, layer, [&]<typename T>() {
    for (int64_t token = block.begin; token < block.end; ++token) {
      if (op.mask && !op.mask[token]) continue;
      const T* s = hidden_row<T>(layer.student, op.tokens, token, n, row_s);
      const T* t = hidden_row<T>(layer.teacher, op.tokens, token, n, row_t);
      if constexpr (__is_same(T, float)) {
        if (op.normalize != kNoNormalize) {
          hidden_normalize(op.normalize, s, n, row_s);
          hidden_normalize(op.normalize, t, n, row_t);
          s = row_s;
          t = row_t;
        }
      }
      total += hidden_squares(s, t, n);
    }
  });
  op.partial[item] = total;
}

void hidden_backward(const HiddenMse& op, int64_t item, float* scratch) {
  const HiddenBlock block = hidden_block(op, item);
  const HiddenLayer& layer = block.layer;
  const int64_t n = layer.features;
  const DType dtype = layer.student.dtype;
  const float coef = *op.upstream * layer.grad_weight;
  float *row_s = scratch, *row_t = scratch + hidden_row_floats(n);
  hidden_mse_with_type(op, layer, [&]<typename T>() {
    for (int64_t token = block.begin; token < block.end; ++token) {
      if (op.mask && !op.mask[token]) {
        hidden_no_gradient(op, layer, token);
        continue;
      }
      const T* s = hidden_row<T>(layer.student, op.tokens, token, n, row_s);
      const T* t = hidden_row<T>(layer.teacher, op.tokens, token, n, row_t);
      if constexpr (__is_same(T, float)) {
        if (op.normalize != kNoNormalize) {
          float* g = dtype == DType::kF32 ? static_cast<float*>(layer.grad_student) + token * n : row_s;
          const HiddenScale scale = hidden_normalize(op.normalize, s, n, row_s);
          hidden_normalize(op.normalize, t, n, row_t);
          hidden_gradient(op.normalize, scale, row_s, row_t, n, coef, g);
          if (dtype != DType::kF32) from_floats(g, n, layer.grad_student, dtype, token * n);
          continue;
        }
      }
      hidden_put_gradient<T>(op, layer, token, row_s, [&](int64_t i, int64_t lanes) {
        return (load_up_to(s + i, lanes, 0) - load_up_to(t + i, lanes, 0)) * coef;
      });
    }
  });
  stream_end();
}
