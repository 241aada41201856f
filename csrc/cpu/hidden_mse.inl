// hidden_mse without a projection: sum |y_s - y_t|^2 over real tokens, y = x, x / max(|x|, eps) or (x - mean) / sqrt(var + eps).
//
// Floor: two reads forward; two reads and one write backward, which recomputes, so nothing is saved. Padded tokens are not read;
// their gradient is written as 0. A normalised row is worked on while it is in the L1 cache, so it costs no more memory traffic.
// Student and teacher go through the same instructions: equal rows give exactly 0.

constexpr float kHiddenEps = 1e-12f;

// The sum of term(position, valid lanes) over n elements: four chains of additions, emptied into a double before they grow long.
template <typename Term>
inline double hidden_sum(int64_t n, const Term& term) {
  constexpr int64_t kChunk = 1024;
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kChunk) {
    const int64_t end = begin + kChunk < n ? begin + kChunk : n;
    vf a = set1(0.0f), b = a, c = a, d = a;
    int64_t i = begin;
    for (; i + 4 * W <= end; i += 4 * W) {
      a += term(i, W);
      b += term(i + W, W);
      c += term(i + 2 * W, W);
      d += term(i + 3 * W, W);
    }
    for (; i + W <= end; i += W) a += term(i, W);
    if (i < end) a += term(i, end - i);
    total += sum((a + b) + (c + d));
  }
  return total;
}

inline double hidden_squares(const float* x, const float* y, int64_t n) {
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

inline const float* hidden_row(const StatesView& view, int64_t tokens, int64_t token, int64_t features, float* scratch) {
  const int64_t offset = token / tokens * view.stride_batch + token % tokens * view.stride_token;
  return as_floats(view.data, view.dtype, offset, view.stride_feature, features, scratch);
}

// Which layer and which of its tokens [begin, end) an item is.
struct HiddenBlock {
  const HiddenLayer& layer;
  int64_t begin, end;
};

inline HiddenBlock hidden_block(const HiddenMse& op, int64_t item) {
  int64_t l = op.num_layers - 1;
  while (op.layers[l].first_item > item) --l;
  const HiddenLayer& layer = op.layers[l];
  const int64_t per_item = hidden_tokens_per_item(layer.features), all = op.batch * op.tokens;
  const int64_t begin = (item - layer.first_item) * per_item;
  return {layer, begin, begin + per_item < all ? begin + per_item : all};
}

void hidden_forward(const HiddenMse& op, int64_t item, float* scratch) {
  const HiddenBlock block = hidden_block(op, item);
  const HiddenLayer& layer = block.layer;
  const int64_t n = layer.features;
  float *row_s = scratch, *row_t = scratch + hidden_row_floats(n);
  double total = 0;
  for (int64_t token = block.begin; token < block.end; ++token) {
    if (op.mask && !op.mask[token]) continue;
    const float* s = hidden_row(layer.student, op.tokens, token, n, row_s);
    const float* t = hidden_row(layer.teacher, op.tokens, token, n, row_t);
    if (op.normalize != kNoNormalize) {
      hidden_normalize(op.normalize, s, n, row_s);
      hidden_normalize(op.normalize, t, n, row_t);
      s = row_s;
      t = row_t;
    }
    total += hidden_squares(s, t, n);
  }
  op.partial[item] = total;
}

void hidden_backward(const HiddenMse& op, int64_t item, float* scratch) {
  const HiddenBlock block = hidden_block(op, item);
  const HiddenLayer& layer = block.layer;
  const int64_t n = layer.features;
  const DType dtype = layer.student.dtype;
  const float coef = *op.upstream * layer.grad_weight;
  float *row_s = scratch, *row_t = scratch + hidden_row_floats(n);
  for (int64_t token = block.begin; token < block.end; ++token) {
    float* g = dtype == DType::kF32 ? static_cast<float*>(layer.grad_student) + token * n : row_s;
    const bool real = !op.mask || op.mask[token];
    if (dtype == DType::kF32 && (!real || op.normalize == kNoNormalize)) {  // the bulk of the traffic: writes that need no reading
      const float* s = real ? hidden_row(layer.student, op.tokens, token, n, row_s) : nullptr;
      const float* t = real ? hidden_row(layer.teacher, op.tokens, token, n, row_t) : nullptr;
      for_vectors(n, [&](int64_t i, int64_t lanes) {
        const vf d = real ? (load_up_to(s + i, lanes, 0) - load_up_to(t + i, lanes, 0)) * coef : set1(0.0f);
        lanes < W ? store_n(g + i, d, lanes) : op.past_cache ? stream(g + i, d) : store(g + i, d);
      });
      continue;
    }
    if (!real) {
      const int64_t bytes = dtype == DType::kF32 ? 4 : 2;
      __builtin_memset(static_cast<char*>(layer.grad_student) + token * n * bytes, 0, n * bytes);
      continue;
    }
    const float* s = hidden_row(layer.student, op.tokens, token, n, row_s);
    const float* t = hidden_row(layer.teacher, op.tokens, token, n, row_t);
    HiddenScale scale{1, false};
    if (op.normalize != kNoNormalize) {
      scale = hidden_normalize(op.normalize, s, n, row_s);
      hidden_normalize(op.normalize, t, n, row_t);
      s = row_s;
      t = row_t;
    }
    hidden_gradient(op.normalize, scale, s, t, n, coef, g);
    if (dtype != DType::kF32) from_floats(g, n, layer.grad_student, dtype, token * n);
  }
  stream_end();
}
