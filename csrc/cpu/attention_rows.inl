// One row of two attention maps: from scores to its loss, and the derivative by the student's scores in place of them.
//
//   x = scale s, p = softmax(x), m the difference of x_s and x_t
//   kl          sum_j p_t (x_t - x_s) - (lse_t - lse_s)     d/dx_s = p_s - p_t
//   reverse kl  sum_j p_s m - (lse_s - lse_t)               d/dx_s = p_s (m - sum_j p_s m)
//   probs       sum_j (p_s - p_t)^2                         d/dx_s = 2 p_s (e - sum_j p_s e), e = p_s - p_t
//   scores      sum_j (x_s - x_t)^2                         d/dx_s = 2 (x_s - x_t)            (where attention_mse.inl cannot)
//
// Scores stay q k^T until the exponential multiplies them by |scale| * log2(e) without rounding the product: a query that is scaled
// first carries its rounding into all scores of its row. Only the scale's sign is packed with the queries, so that maxima are maxima.

// f(position, valid lanes) over n elements, whole vectors first.
template <typename F>
inline void for_vectors(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + W <= n; i += W) f(i, W);
  if (i < n) f(i, n - i);
}

inline vf load_up_to(const float* p, int64_t lanes, float fill) { return lanes == W ? load(p) : load_n(p, lanes, fill); }
inline void store_up_to(float* p, vf x, int64_t lanes) { lanes == W ? store(p, x) : store_n(p, x, lanes); }

// What turns differences of scores into differences of x, and into exponents of 2.
struct RowScales {
  vf s, t, log2_s, log2_t;
};

// What queries are packed with: 1, -1, and 0 where all scores are 0, as a scale of 0 would make NaN of the -inf behind a row.
inline float sign_of(float scale) { return static_cast<float>((scale > 0) - (scale < 0)); }

// A row to which a bias was added is scaled already, and one of zeros needs no scale.
inline RowScales row_scales(const Attention& op) {
  const auto left = [](bool biased, float scale) { return biased || scale == 0 ? 1.0f : __builtin_fabsf(scale); };
  const float s = left(op.bias_s.data, op.scale_s), t = left(op.bias_t.data, op.scale_t);
  return {set1(s), set1(t), set1(static_cast<float>(s * 1.4426950408889634)), set1(static_cast<float>(t * 1.4426950408889634))};
}

// One row of both maps: the loss, and where kGrad, dx (times `weight`) over `s`.
template <bool kGrad>
inline double kl_row(const RowScales& scale, float* s, float* t, int64_t n, float weight) {
  const float ninf = -__builtin_inff();
  vf max_s = set1(ninf), max_t = max_s;
  for_vectors(n, [&](int64_t i, int64_t lanes) {
    max_s = vmax(load_up_to(s + i, lanes, ninf), max_s);
    max_t = vmax(load_up_to(t + i, lanes, ninf), max_t);
  });
  const vf ms = set1(max(max_s)), mt = set1(max(max_t));
  vf z_s = set1(0.0f), z_t = z_s, moment = z_s;
  for_vectors(n, [&](int64_t i, int64_t lanes) {
    const vf ds = load_up_to(s + i, lanes, ninf) - ms, dt = load_up_to(t + i, lanes, ninf) - mt;
    const vf es = exp2_scaled(ds, scale.log2_s), et = exp2_scaled(dt, scale.log2_t);
    z_s += es;
    z_t += et;
    moment += weigh(et, dt * scale.t - ds * scale.s);
    if (kGrad) {
      store_up_to(s + i, es, lanes);
      store_up_to(t + i, et, lanes);
    }
  });
  const double zs = sum(z_s), zt = sum(z_t);
  if (kGrad) {
    const vf scale_s = set1(static_cast<float>(weight / zs)), scale_t = set1(static_cast<float>(weight / zt));
    for_vectors(n, [&](int64_t i, int64_t lanes) {
      store_up_to(s + i, load_up_to(s + i, lanes, 0) * scale_s - load_up_to(t + i, lanes, 0) * scale_t, lanes);
    });
  }
  return sum(moment) / zt - __builtin_log(zt / zs);
}

template <bool kGrad>
inline double reverse_kl_row(const RowScales& scale, float* s, float* t, int64_t n, float weight) {
  const float ninf = -__builtin_inff();
  vf max_s = set1(ninf), max_t = max_s;
  for_vectors(n, [&](int64_t i, int64_t lanes) {
    max_s = vmax(load_up_to(s + i, lanes, ninf), max_s);
    max_t = vmax(load_up_to(t + i, lanes, ninf), max_t);
  });
  const vf ms = set1(max(max_s)), mt = set1(max(max_t));
  vf z_s = set1(0.0f), z_t = z_s, moment = z_s;
  for_vectors(n, [&](int64_t i, int64_t lanes) {
    const vf ds = load_up_to(s + i, lanes, ninf) - ms, dt = load_up_to(t + i, lanes, ninf) - mt;
    const vf es = exp2_scaled(ds, scale.log2_s), difference = ds * scale.s - dt * scale.t;
    z_s += es;
    z_t += exp2_scaled(dt, scale.log2_t);
    moment += weigh(es, difference);
    if (kGrad) {
      store_up_to(s + i, es, lanes);
      store_up_to(t + i, difference, lanes);
    }
  });
  const double zs = sum(z_s), zt = sum(z_t), mean = sum(moment) / zs;
  if (kGrad) {
    const vf scale_s = set1(static_cast<float>(weight / zs)), shift = set1(static_cast<float>(mean));
    for_vectors(n, [&](int64_t i, int64_t lanes) {
      store_up_to(s + i, weigh(load_up_to(s + i, lanes, 0) * scale_s, load_up_to(t + i, lanes, 0) - shift), lanes);
    });
  }
  return mean - __builtin_log(zs / zt);
}

// Both kinds of KL where lse_s and lse_t are known: neither a maximum nor a sum has to be found first.
template <bool kGrad, bool kReverse>
inline double normalized_row(const RowScales& scale, float* s, float* t, int64_t n, float weight, float lse_s, float lse_t) {
  const float ninf = -__builtin_inff();
  const vf ms = set1(lse_s) / scale.s, mt = set1(lse_t) / scale.t, by = set1(weight);
  vf moment = set1(0.0f);
  for_vectors(n, [&](int64_t i, int64_t lanes) {
    const vf ds = load_up_to(s + i, lanes, ninf) - ms, dt = load_up_to(t + i, lanes, ninf) - mt;
    const vf difference = ds * scale.s - dt * scale.t, pt = exp2_scaled(dt, scale.log2_t);
    const vf ps = kReverse || kGrad ? exp2_scaled(ds, scale.log2_s) : pt;
    moment += weigh(kReverse ? ps : pt, difference);
    if (kGrad) store_up_to(s + i, kReverse ? ps : (ps - pt) * by, lanes);
    if (kGrad && kReverse) store_up_to(t + i, difference, lanes);
  });
  const float total = sum(moment);
  if (kGrad && kReverse) {
    const vf shift = set1(total);
    for_vectors(n, [&](int64_t i, int64_t lanes) {
      store_up_to(s + i, weigh(load_up_to(s + i, lanes, 0) * by, load_up_to(t + i, lanes, 0) - shift), lanes);
    });
  }
  return kReverse ? total : -total;
}

template <bool kGrad>
inline double mse_row(const RowScales& scale, float* s, float* t, int64_t n, float weight) {
  const float ninf = -__builtin_inff();
  vf max_s = set1(ninf), max_t = max_s;
  for_vectors(n, [&](int64_t i, int64_t lanes) {
    max_s = vmax(load_up_to(s + i, lanes, ninf), max_s);
    max_t = vmax(load_up_to(t + i, lanes, ninf), max_t);
  });
  const vf ms = set1(max(max_s)), mt = set1(max(max_t));
  vf z_s = set1(0.0f), z_t = z_s;
  for_vectors(n, [&](int64_t i, int64_t lanes) {
    const vf es = exp2_scaled(load_up_to(s + i, lanes, ninf) - ms, scale.log2_s);
    const vf et = exp2_scaled(load_up_to(t + i, lanes, ninf) - mt, scale.log2_t);
    z_s += es;
    z_t += et;
    store_up_to(s + i, es, lanes);
    store_up_to(t + i, et, lanes);
  });
  const vf inv_s = set1(1.0f / sum(z_s)), inv_t = set1(1.0f / sum(z_t));
  vf squares = set1(0.0f), dot = squares;
  for_vectors(n, [&](int64_t i, int64_t lanes) {
    const vf p = load_up_to(s + i, lanes, 0) * inv_s, e = p - load_up_to(t + i, lanes, 0) * inv_t;
    squares = fma(e, e, squares);
    dot = fma(p, e, dot);
    if (kGrad) {
      store_up_to(s + i, p, lanes);
      store_up_to(t + i, e, lanes);
    }
  });
  if (kGrad) {
    const vf mean = set1(sum(dot)), twice = set1(2 * weight);
    for_vectors(n, [&](int64_t i, int64_t lanes) {
      store_up_to(s + i, load_up_to(s + i, lanes, 0) * twice * (load_up_to(t + i, lanes, 0) - mean), lanes);
    });
  }
  return sum(squares);
}

template <bool kGrad>
inline double scores_row(const RowScales& scale, float* s, const float* t, int64_t n, float weight) {
  vf squares = set1(0.0f);
  const vf twice = set1(2 * weight);
  for_vectors(n, [&](int64_t i, int64_t lanes) {
    const vf e = load_up_to(s + i, lanes, 0) * scale.s - load_up_to(t + i, lanes, 0) * scale.t;
    squares = fma(e, e, squares);
    if (kGrad) store_up_to(s + i, e * twice, lanes);
  });
  return sum(squares);
}

template <bool kGrad>
inline double map_row(MapLoss kind, const RowScales& scale, float* s, float* t, int64_t n, float weight) {
  switch (kind) {
    case MapLoss::kKl: return kl_row<kGrad>(scale, s, t, n, weight);
    case MapLoss::kReverseKl: return reverse_kl_row<kGrad>(scale, s, t, n, weight);
    case MapLoss::kMseProbs: return mse_row<kGrad>(scale, s, t, n, weight);
    default: return scores_row<kGrad>(scale, s, t, n, weight);
  }
}

template <bool kGrad>
inline double normalized_row(MapLoss kind, const RowScales& scale, float* s, float* t, int64_t n, float weight, float lse_s, float lse_t) {
  return kind == MapLoss::kKl ? normalized_row<kGrad, false>(scale, s, t, n, weight, lse_s, lse_t)
                              : normalized_row<kGrad, true>(scale, s, t, n, weight, lse_s, lse_t);
}
