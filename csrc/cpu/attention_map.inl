// Losses between two attention maps given as scores: mean squared error of the scores, and KL after the softmax.
//
//   x = scale * scores over real keys, summed over the heads of a map
//   MSE row: sum_j (x_s - x_t)^2                        d/ds = 2 scale_s (x_s - x_t)
//   KL row:  sum_j p_t (x_t - x_s) - (lse_t - lse_s)    d/ds = scale_s (p_s - p_t),  p = softmax(x)
//
// Bound by memory: forward reads the n^2 real entries of both maps, backward reads them again and writes N^2. A gradient that forward
// leaves and backward rescales would cross memory as often, and need a second map. What is padding is not read, and its zeros are
// written in the same stream as the gradient.
//
// One item is a block of rows of one map. A row stays in the L1 cache between the maximum and the exponentials. Real keys mostly are
// one run, which is walked where it lies; keys with holes are packed first.

struct MapBlock {
  int64_t batch, map, begin, end;
  const int32_t* real;  // tokens, n of them
  int64_t n, first, span;  // the run from the first real token to the last; n == span: without holes
};

inline MapBlock map_block(const AttentionMap& op, int64_t item) {
  const int64_t blocks = map_blocks(op.tokens), index = item / blocks, rows = map_rows_per_item(op.tokens);
  MapBlock k;
  k.batch = index / op.maps;
  k.map = index % op.maps;
  k.begin = item % blocks * rows;
  k.end = k.begin + rows < op.tokens ? k.begin + rows : op.tokens;
  k.real = op.real_tokens + k.batch * op.tokens;
  k.n = op.num_real[k.batch];
  k.first = k.n > 0 ? k.real[0] : 0;
  k.span = k.n > 0 ? k.real[k.n - 1] - k.first + 1 : 0;
  return k;
}

// f(row, whether it is real) for the rows of a block.
template <typename F>
inline void for_rows(const MapBlock& k, const F& f) {
  int64_t next = 0;
  while (next < k.n && k.real[next] < k.begin) ++next;
  for (int64_t row = k.begin; row < k.end; ++row) {
    const bool real = next < k.n && k.real[next] == row;
    f(row, real);
    next += real;
  }
}

// Rows of floats that belong to a worker.
struct MapRowScratch {
  float *s, *t, *head, *gradient;
};

int64_t attention_map_scratch(const AttentionMap& op) { return 4 * round_up(op.tokens, 16); }

inline MapRowScratch map_scratch(const AttentionMap& op, float* scratch) {
  const int64_t width = round_up(op.tokens, 16);
  return {scratch, scratch + width, scratch + 2 * width, scratch + 3 * width};
}

constexpr int64_t kMapAhead = 4;  // rows; short runs of real keys end before the hardware's own prefetching pays

// A row of scores at its real keys, and how far behind it in memory lies the row that is fetched meanwhile.
template <typename T>
struct MapRow {
  const T* x;
  int64_t ahead;
};

// Calls f.template operator()<T>() with the type that both rows are read as: their own 16-bit type where it is one and nothing has to be
// summed or packed, else floats.
template <typename F>
inline void with_map_type(const AttentionMap& op, const MapBlock& k, const F& f) {
  const auto as_it_lies = [&](const ScoresView& x) { return x.heads == 1 && x.stride_key == 1 && k.n == k.span; };
  const bool alike = op.student.dtype == op.teacher.dtype && as_it_lies(op.student) && as_it_lies(op.teacher);
  if (alike && op.student.dtype == DType::kBF16) return f.template operator()<Bf16>();
  if (alike && op.student.dtype == DType::kF16) return f.template operator()<F16>();
  f.template operator()<float>();
}

// A row of a map at its n real keys: the scores where they lie, or what has to be summed, converted or packed, in `out`.
template <typename T>
inline MapRow<T> map_scores(const ScoresView& x, const MapBlock& k, int64_t row, float* out, float* head_row) {
  const int64_t base = k.batch * x.stride_batch + k.map * x.heads * x.stride_head + row * x.stride_query + k.first * x.stride_key;
  if constexpr (!__is_same(T, float)) return {static_cast<const T*>(x.data) + base, kMapAhead * x.stride_query};
  else {
    const auto head = [&](int64_t h, float* scratch) {
      return as_floats(x.data, x.dtype, base + h * x.stride_head, x.stride_key, k.span, scratch);
    };
    const float* scores = head(0, out);
    for (int64_t h = 1; h < x.heads; ++h) {
      const float* more = head(h, head_row);
      for_vectors(k.span, [&](int64_t i, int64_t lanes) {
        store_up_to(out + i, load_up_to(scores + i, lanes, 0) + load_up_to(more + i, lanes, 0), lanes);
      });
      scores = out;
    }
    if (k.n == k.span) return {scores, scores == out ? 0 : kMapAhead * x.stride_query};
    for (int64_t j = 0; j < k.n; ++j) out[j] = scores[k.real[j] - k.first];
    return {out, 0};
  }
}

// f(position, elements) over n elements, whole pairs of vectors first.
template <typename F>
inline void for_pairs(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) f(i, 2 * W);
  if (i < n) f(i, n - i);
}

template <typename T>
inline Pair load_pair_up_to(const T* p, int64_t n, float fill) { return n == 2 * W ? load_pair(p) : load_pair_n(p, n, fill); }

template <typename T>
inline Pair fetch(const MapRow<T>& row, int64_t i, int64_t n, float fill) {
  const char* next = reinterpret_cast<const char*>(row.x + i + row.ahead);
  for (unsigned line = 0; line < 2 * W * sizeof(T); line += 64) __builtin_prefetch(next + line);
  return load_pair_up_to(row.x + i, n, fill);
}

template <typename T>
inline double map_mse_row(const AttentionMap& op, MapRow<T> s, MapRow<T> t, int64_t n) {
  const vf scale_s = set1(op.scale_s), scale_t = set1(op.scale_t);
  vf squares_a = set1(0.0f), squares_b = squares_a;
  for_pairs(n, [&](int64_t i, int64_t count) {
    const Pair xs = fetch(s, i, count, 0), xt = fetch(t, i, count, 0);
    const vf a = xs.a * scale_s - xt.a * scale_t, b = xs.b * scale_s - xt.b * scale_t;
    squares_a = fma(a, a, squares_a);
    squares_b = fma(b, b, squares_b);
  });
  return sum(squares_a + squares_b);
}

inline vf map_exponent(float scale) { return set1(static_cast<float>(scale * 1.4426950408889634)); }

template <typename T>
inline double map_kl_row(const AttentionMap& op, MapRow<T> s, MapRow<T> t, int64_t n, float* stats) {
  const float ninf = -__builtin_inff();
  vf max_s = set1(ninf), max_t = max_s;
  for_pairs(n, [&](int64_t i, int64_t count) {
    const Pair xs = load_pair_up_to(s.x + i, count, ninf), xt = load_pair_up_to(t.x + i, count, ninf);
    max_s = vmax(xs.b, vmax(xs.a, max_s));
    max_t = vmax(xt.b, vmax(xt.a, max_t));
  });
  stats[kMapMaxS] = finite(max(max_s));
  stats[kMapMaxT] = finite(max(max_t));
  const vf ms = set1(stats[kMapMaxS]), mt = set1(stats[kMapMaxT]), log2_s = map_exponent(op.scale_s), log2_t = map_exponent(op.scale_t);
  const vf ratio = set1(op.scale_t / op.scale_s);  // 1 in all but means over unlike numbers of heads: then nothing is rounded
  vf z_s = set1(0.0f), z_t = z_s, moment = z_s;
  const auto add = [&](vf xs, vf xt) {
    const vf ds = xs - ms, dt = xt - mt, et = exp2_scaled(dt, log2_t);
    z_s += exp2_scaled(ds, log2_s);
    z_t += et;
    moment += weigh(et, dt * ratio - ds);
  };
  for_pairs(n, [&](int64_t i, int64_t count) {
    const Pair xs = fetch(s, i, count, ninf), xt = fetch(t, i, count, ninf);
    add(xs.a, xt.a);
    add(xs.b, xt.b);
  });
  const double zs = sum(z_s), zt = sum(z_t);
  stats[kMapInvZS] = static_cast<float>(1 / zs);
  stats[kMapInvZT] = static_cast<float>(1 / zt);
  return op.scale_s * (sum(moment) / zt) - __builtin_log(zt / zs);
}

// The gradient of W entries.
struct MapMseGradient {
  vf scale_s, scale_t, coef;

  vf operator()(vf xs, vf xt) const { return (xs * scale_s - xt * scale_t) * coef; }
};

struct MapKlGradient {
  vf max_s, max_t, log2_s, log2_t, of_s, of_t;

  vf operator()(vf xs, vf xt) const { return exp2_scaled(xs - max_s, log2_s) * of_s - exp2_scaled(xt - max_t, log2_t) * of_t; }
};

inline MapMseGradient map_mse_gradient(const AttentionMap& op, float weight) {
  return {set1(op.scale_s), set1(op.scale_t), set1(2 * weight * op.scale_s)};
}

inline MapKlGradient map_kl_gradient(const AttentionMap& op, const float* stats, float weight) {
  const float slope = weight * op.scale_s;
  return {set1(stats[kMapMaxS]),       set1(stats[kMapMaxT]),          map_exponent(op.scale_s),
          map_exponent(op.scale_t),    set1(stats[kMapInvZS] * slope), set1(stats[kMapInvZT] * slope)};
}

template <typename T>
inline void map_put(T* p, Pair x, int64_t n, bool past_cache) {
  if (n < 2 * W) store_pair_n(p, x, n);
  else past_cache ? stream_pair(p, x) : store_pair(p, x);
}

// n entries, and zeros behind them up to `width`, so that no vector is written in two parts.
template <typename T, typename G>
inline void map_gradient_row(const G& of, MapRow<T> s, MapRow<T> t, int64_t n, T* out, int64_t width, bool past_cache) {
  const G gradient = of;  // a copy that stores to out cannot change
  for_pairs(n, [&](int64_t i, int64_t count) {
    const Pair xs = fetch(s, i, count, 0), xt = fetch(t, i, count, 0);
    const Pair y{gradient(xs.a, xt.a), gradient(xs.b, xt.b)};
    if (count == 2 * W || i + 2 * W > width) return map_put(out + i, y, count, past_cache);
    T edge[2 * W] = {};
    store_pair_n(edge, y, count);
    map_put(out + i, load_pair(edge), 2 * W, past_cache);
  });
}

// Zeros from `begin` to `end` of a row, whole pairs where they would be if the row were full.
template <typename T>
inline void map_zeros(T* row, int64_t begin, int64_t end, bool past_cache) {
  const Pair zero{set1(0.0f), set1(0.0f)};
  for (int64_t next; begin < end; begin = next) {
    next = (begin / (2 * W) + 1) * (2 * W);
    if (next > end) next = end;
    map_put(row + begin, zero, next - begin, past_cache);
  }
}

void attention_map_forward(const AttentionMap& op, int64_t item, float* scratch) {
  const MapBlock k = map_block(op, item);
  const MapRowScratch buffers = map_scratch(op, scratch);
  double total = 0;
  with_map_type(op, k, [&]<typename T>() {
    for_rows(k, [&](int64_t row, bool real) {
      const int64_t index = (k.batch * op.maps + k.map) * op.tokens + row;
      float* stats = op.stats ? op.stats + index * kMapStats : nullptr;
      double loss = 0;
      if (real) {
        const MapRow<T> s = map_scores<T>(op.student, k, row, buffers.s, buffers.head);
        const MapRow<T> t = map_scores<T>(op.teacher, k, row, buffers.t, buffers.head);
        loss = op.kl ? map_kl_row(op, s, t, k.n, stats) : map_mse_row(op, s, t, k.n);
      } else if (stats) {
        for (int i = 0; i < kMapStats; ++i) stats[i] = 0;
      }
      if (op.row_loss) op.row_loss[index] = static_cast<float>(loss);
      total += loss;
    });
  });
  op.partial[item] = total;
}

// The gradient of a real row at its n real keys, into `out`, zeros up to `width`.
template <typename T>
inline void map_real_gradient(const AttentionMap& op, const MapBlock& k, int64_t row, const MapRowScratch& buffers, T* out, int64_t width,
                              bool past_cache) {
  float weight = op.grad_weight;
  if (op.row_weight)
    weight *= op.row_weight[k.batch * op.row_weight_stride_batch + k.map * op.row_weight_stride_map + row * op.row_weight_stride_token];
  const MapRow<T> s = map_scores<T>(op.student, k, row, buffers.s, buffers.head);
  const MapRow<T> t = map_scores<T>(op.teacher, k, row, buffers.t, buffers.head);
  if (!op.kl) return map_gradient_row(map_mse_gradient(op, weight), s, t, k.n, out, width, past_cache);
  const float* stats = op.stats + ((k.batch * op.maps + k.map) * op.tokens + row) * kMapStats;
  map_gradient_row(map_kl_gradient(op, stats, weight), s, t, k.n, out, width, past_cache);
}

void attention_map_backward(const AttentionMap& op, int64_t item, float* scratch) {
  const MapBlock k = map_block(op, item);
  const MapRowScratch buffers = map_scratch(op, scratch);
  const int64_t heads = op.student.heads, first_head = (k.batch * op.maps + k.map) * heads;
  with_map_type(op, k, [&]<typename T>() {
    // In place where the gradient has the type that is computed in, one head and no holes; else by way of a row of floats.
    const bool in_place = heads == 1 && k.n == k.span && (!__is_same(T, float) || op.student.dtype == DType::kF32);
    const int64_t whole = round_up(k.n, 2 * W), width = k.first + whole <= op.tokens ? whole : k.n;
    for_rows(k, [&](int64_t row, bool real) {
      const int64_t offset = (first_head * op.tokens + row) * op.tokens;
      if (in_place) {
        T* out = static_cast<T*>(op.grad_student) + offset;
        map_zeros(out, 0, real ? k.first : op.tokens, op.past_cache);
        if (real) {
          map_real_gradient<T>(op, k, row, buffers, out + k.first, width, op.past_cache);
          map_zeros(out, k.first + width, op.tokens, op.past_cache);
        }
        return;
      }
      map_zeros(buffers.gradient, 0, op.tokens, false);
      if (real) {
        map_real_gradient<float>(op, k, row, buffers, buffers.s, k.n, false);
        for (int64_t j = 0; j < k.n; ++j) buffers.gradient[k.real[j]] = buffers.s[j];
      }
      for (int64_t h = 0; h < heads; ++h)
        from_floats(buffers.gradient, op.tokens, op.grad_student, op.student.dtype, offset + h * op.tokens * op.tokens);
    });
  });
  stream_end();
}
