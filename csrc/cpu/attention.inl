// Losses between two attention maps straight from queries and keys: KL, and mean squared error of probabilities or of scores.
//
//   x = scale q k^T over real keys, p = softmax(x)
//   KL row:  sum_j p_t (x_t - x_s) - (lse_t - lse_s)     d/dx_s = p_s - p_t
//   MSE row: sum_j (p_s - p_t)^2                         d/dx_s = 2 p_s (e - sum_j p_s e), e = p_s - p_t
//   of scores: sum_j (x_s - x_t)^2                       d/dx_s = 2 (x_s - x_t)            (where attention_mse.inl cannot)
//   dq = scale dx k, dk = scale dx^T q
//
// One item is one (batch, head). Its real tokens are packed (padding costs nothing afterwards), then rows of the maps are made in
// blocks that fit the L2 cache: both scores, both softmaxes, the loss, dx in place, and dx goes into dq and dk while it is hot. So
// the maps are computed once, in memory linear in N. Floor: 2 n^2 (d_s + d_t) + 4 n^2 d_s fp32 operations and 2 n^2 exponentials.
//
// Scores stay q k^T until the exponential multiplies them by |scale| * log2(e) without rounding the product: a query that is scaled
// first carries its rounding into all scores of its row. Only the scale's sign is packed with the queries, so that maxima are maxima.

struct MapSizes {
  int64_t tokens, rows, columns;  // tokens; padded to whole tiles; the distance between rows of a map block
  int64_t block;                  // rows of a map block
  int64_t depth_s;                // the student's head size, padded to whole vectors
};

inline MapSizes map_sizes(const Attention& op) {
  MapSizes s;
  s.tokens = op.tokens;
  s.rows = round_up(op.tokens, kRowPad);
  s.columns = round_up(op.tokens, kPanel * kRowPad / 4) + W;  // odd in vectors: rows do not all fall into the same cache sets
  constexpr int64_t kBlockFloats = 65536;                     // two map blocks are 512 KiB
  const int64_t fitting = kBlockFloats / s.columns / kRowPad * kRowPad;
  s.block = fitting < kRowPad ? kRowPad : fitting > 4 * kRowPad ? 4 * kRowPad : fitting;
  s.depth_s = round_up(op.q_s.size, W);
  return s;
}

// The item's operands, packed: queries times the sign of the scale by rows, keys by rows and as transposed panels.
struct MapBuffers {
  int32_t* token;  // packed row -> token
  float *q_s, *q_t, *k_s, *panels_s, *panels_t;
  float *map_s, *map_t, *dq, *dk, *row;
};

// Lays the buffers out in `scratch`; returns the number of floats. With a null scratch it only counts.
inline int64_t map_buffers(const Attention& op, const MapSizes& s, float* scratch, MapBuffers& b) {
  int64_t used = 0;
  const auto take = [&](int64_t floats) {
    float* p = scratch ? scratch + used : nullptr;
    used += round_up(floats, 16);
    return p;
  };
  const int64_t panel_rows = round_up(op.tokens, kPanel);
  b.token = reinterpret_cast<int32_t*>(take(op.tokens));
  b.q_s = take(s.rows * s.depth_s);
  b.q_t = take(s.rows * op.q_t.size);
  b.k_s = take(s.rows * s.depth_s);
  b.panels_s = take(panel_rows * op.q_s.size);
  b.panels_t = take(panel_rows * op.q_t.size);
  b.map_s = take(s.block * s.columns);
  b.map_t = take(s.block * s.columns);
  b.dq = take(s.rows * s.depth_s);
  b.dk = take(s.rows * s.depth_s);
  b.row = take(s.depth_s > op.q_t.size ? s.depth_s : op.q_t.size);
  return used;
}

int64_t attention_scratch(const Attention& op) {
  MapBuffers unused;
  return map_buffers(op, map_sizes(op), nullptr, unused);
}

inline int64_t real_tokens(const Attention& op, int64_t batch, int32_t* token) {
  int64_t n = 0;
  for (int64_t i = 0; i < op.tokens; ++i)
    if (!op.mask || op.mask[batch * op.tokens + i]) token[n++] = static_cast<int32_t>(i);
  return n;
}

inline const float* head_row(const HeadsView& x, int64_t batch, int64_t head, int64_t token, float* scratch) {
  const int64_t offset = batch * x.stride_batch + head * x.stride_head + token * x.stride_token;
  return as_floats(x.data, x.dtype, offset, x.stride_size, x.size, scratch);
}

// Real rows of x times `scale` into out [rows, width]; columns past the head size and rows past n (up to `rows`) are 0.
inline void pack_rows(const HeadsView& x, int64_t batch, int64_t head, const int32_t* token, int64_t n, int64_t rows, float scale,
                      float* out, int64_t width, float* scratch) {
  for (int64_t r = 0; r < rows; ++r, out += width) {
    int64_t k = 0;
    if (r < n) {
      const float* row = head_row(x, batch, head, token[r], scratch);
      for (; k + W <= x.size; k += W) store(out + k, load(row + k) * scale);
      for (; k < x.size; ++k) out[k] = row[k] * scale;
    }
    for (; k < width; ++k) out[k] = 0;
  }
}

// Rows of x as columns: panel p holds rows [p * kPanel, ...) as [size, kPanel]; columns past n are 0.
inline void pack_panels(const HeadsView& x, int64_t batch, int64_t head, const int32_t* token, int64_t n, float* out, float* scratch) {
  for (int64_t first = 0; first < n; first += kPanel, out += kPanel * x.size) {
    const int64_t last = first + kPanel < n ? first + kPanel : n;
    for (int64_t r = first; r < last; ++r) {
      const float* row = head_row(x, batch, head, token[r], scratch);
      for (int64_t k = 0; k < x.size; ++k) out[k * kPanel + r - first] = row[k];
    }
    for (int64_t r = last; r < first + kPanel; ++r)
      for (int64_t k = 0; k < x.size; ++k) out[k * kPanel + r - first] = 0;
  }
}

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

inline RowScales row_scales(const Attention& op) {
  const float s = __builtin_fabsf(op.scale_s), t = __builtin_fabsf(op.scale_t);
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
    case MapLoss::kMseProbs: return mse_row<kGrad>(scale, s, t, n, weight);
    default: return scores_row<kGrad>(scale, s, t, n, weight);
  }
}

inline float row_weight(const Attention& op, int64_t batch, int64_t head, int64_t token) {
  if (!op.row_weight) return op.grad_weight;
  return op.grad_weight * op.row_weight[batch * op.row_weight_stride_batch + head * op.row_weight_stride_head +
                                        token * op.row_weight_stride_token];
}

// Gradient rows of all tokens: a * x (+ b * y where y is not null) for the real ones, 0 for the others.
inline void write_gradient(const Attention& op, const MapBuffers& buf, int64_t batch, int64_t head, int64_t n, void* out,
                           const HeadsView& view, const float* x, float a, const float* y, float b, int64_t width) {
  if (!out) return;
  int64_t r = 0;
  for (int64_t i = 0; i < op.tokens; ++i) {
    const bool real = r < n && buf.token[r] == i;
    for (int64_t k = 0; k < width; k += W) {
      vf g = set1(0.0f);
      if (real) g = y ? load(x + r * width + k) * a + load(y + r * width + k) * b : load(x + r * width + k) * a;
      store(buf.row + k, g);
    }
    r += real;
    from_floats(buf.row, view.size, out, view.dtype, batch * view.stride_batch + head * view.stride_head + i * view.stride_token);
  }
}

void attention_maps(const Attention& op, int64_t item, float* scratch) {
  const int64_t batch = item / op.heads, head = item % op.heads;
  const MapSizes size = map_sizes(op);
  MapBuffers buf;
  map_buffers(op, size, scratch, buf);
  const int64_t n = real_tokens(op, batch, buf.token);
  const int64_t columns = round_up(n, W), key_rows = round_up(n, kRowPad);
  const bool grad = op.grad_q || op.grad_k;
  const RowScales scale = row_scales(op);
  float* losses = op.row_loss ? op.row_loss + item * op.tokens : nullptr;
  if (losses)
    for (int64_t i = 0; i < op.tokens; ++i) losses[i] = 0;

  pack_rows(op.q_s, batch, head, buf.token, n, key_rows, op.scale_s < 0 ? -1 : 1, buf.q_s, size.depth_s, buf.row);
  pack_rows(op.q_t, batch, head, buf.token, n, key_rows, op.scale_t < 0 ? -1 : 1, buf.q_t, op.q_t.size, buf.row);
  pack_panels(op.k_s, batch, head, buf.token, n, buf.panels_s, buf.row);
  pack_panels(op.k_t, batch, head, buf.token, n, buf.panels_t, buf.row);
  if (grad) pack_rows(op.k_s, batch, head, buf.token, n, key_rows, 1, buf.k_s, size.depth_s, buf.row);

  double total = 0;
  for (int64_t first = 0; first < n; first += size.block) {
    const int64_t rows = n - first < size.block ? n - first : size.block, padded = round_up(rows, kRowPad);
    gemm<false>(padded, columns, op.q_s.size, buf.q_s + first * size.depth_s, size.depth_s, 1, buf.panels_s, kPanel,
                kPanel * op.q_s.size, buf.map_s, size.columns);
    gemm<false>(padded, columns, op.q_t.size, buf.q_t + first * op.q_t.size, op.q_t.size, 1, buf.panels_t, kPanel,
                kPanel * op.q_t.size, buf.map_t, size.columns);
    for (int64_t r = 0; r < rows; ++r) {
      float *s = buf.map_s + r * size.columns, *t = buf.map_t + r * size.columns;
      const int64_t token = buf.token[first + r];
      const double loss = grad ? map_row<true>(op.kind, scale, s, t, n, row_weight(op, batch, head, token))
                               : map_row<false>(op.kind, scale, s, t, n, 0);
      if (losses) losses[token] = static_cast<float>(loss);
      total += loss;
    }
    if (!grad) continue;
    gemm<false>(padded, size.depth_s, n, buf.map_s, size.columns, 1, buf.k_s, size.depth_s, kPanel, buf.dq + first * size.depth_s,
                size.depth_s);
    const auto into_dk = first == 0 ? gemm<false, float> : gemm<true, float>;
    into_dk(key_rows, size.depth_s, rows, buf.map_s, 1, size.columns, buf.q_s + first * size.depth_s, size.depth_s, kPanel, buf.dk,
            size.depth_s);
  }
  if (op.item_loss) op.item_loss[item] = total;
  if (!grad) return;
  const float rest = __builtin_fabsf(op.scale_s);  // the packed queries carry the sign
  if (op.grad_k) {
    write_gradient(op, buf, batch, head, n, op.grad_q, op.grad_q_view, buf.dq, op.scale_s, nullptr, 0, size.depth_s);
    write_gradient(op, buf, batch, head, n, op.grad_k, op.grad_k_view, buf.dk, rest, nullptr, 0, size.depth_s);
  } else {
    write_gradient(op, buf, batch, head, n, op.grad_q, op.grad_q_view, buf.dq, op.scale_s, buf.dk, rest, size.depth_s);
  }
}
