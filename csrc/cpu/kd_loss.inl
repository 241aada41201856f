// kd_loss on the CPU: rows of logits in, row losses and statistics out; backward recomputes both softmaxes from the statistics.
//
//   kl: sum p_t (x_t - x_s) - (lse_t - lse_s), x = logits / T;   d/ds = (p_s - p_t) / T   (formulas of all kinds: docs of the op)
//
// Floor: 2 reads of V floats forward, 2 reads and 1 write backward. A row is walked in chunks that stay in the L1 cache: maxima
// first, then exponentials, with the running sums rescaled when a maximum grows, so memory is read once. Sums of a chunk are
// added up in double: 30522 terms lose nothing. jsd and tv need both normalisers first and read the row a second time (from L2).

constexpr int64_t kKdChunk = 2048;  // floats of each side; two chunks fill half of a 32 KiB L1

struct KdRow {
  LogitsView student, teacher;
  int64_t offset_s, offset_t;
};

inline int64_t kd_offset(const KdLoss& op, const LogitsView& x, int64_t row) {
  return row / op.inner * x.stride_outer + row % op.inner * x.stride_inner;
}

inline KdRow kd_row(const KdLoss& op, int64_t row) {
  return {op.student, op.teacher, kd_offset(op, op.student, row), kd_offset(op, op.teacher, row)};
}

inline float kd_upstream(const KdLoss& op, int64_t row) {
  return op.grad_loss[row / op.inner * op.grad_stride_outer + row % op.inner * op.grad_stride_inner];
}

// n logits of a row. As floats they may be a copy in `scratch`; as Bf16 or F16 they are the row itself.
template <typename T = float>
inline const T* kd_chunk(const LogitsView& view, int64_t offset, int64_t first, int64_t n, float* scratch) {
  if constexpr (__is_same(T, float))
    return as_floats(view.data, view.dtype, offset + first * view.stride_class, view.stride_class, n, scratch);
  return static_cast<const T*>(view.data) + offset + first;
}

// Calls f.template operator()<T>() with the type that both rows can be read as: their own where it is one and classes are neighbours.
template <typename F>
inline auto with_logit(const KdLoss& op, const F& f) {
  const bool alike = op.student.dtype == op.teacher.dtype && op.student.stride_class == 1 && op.teacher.stride_class == 1;
  if (alike && op.student.dtype == DType::kBF16) return f.template operator()<Bf16>();
  if (alike && op.student.dtype == DType::kF16) return f.template operator()<F16>();
  return f.template operator()<float>();
}

// Asks for the pair of the next chunk while this one is computed (512 x 30522 fp32: 5.6 -> 3.5 ms forward).
template <typename T>
inline void kd_prefetch(const T* p) {
  for (unsigned line = 0; line < 2 * W * sizeof(T); line += 64) __builtin_prefetch(reinterpret_cast<const char*>(p + kKdChunk) + line);
}

// A sum of exponentials relative to a running maximum, and first moments that ride on the same exponentials.
struct OnlineSum {
  float max = -__builtin_inff();
  double z = 0, moment = 0, own = 0;  // sum e, sum e (this - max - other + other's max), sum e (this - max)
};

// What exponentials are relative to: finite even where all classes so far are -inf, which keeps -inf - reference from being NaN.
inline float finite(float max) { return max > -__FLT_MAX__ ? max : -__FLT_MAX__; }

// Moves the reference of `a` by `shift` = old - new maximum <= 0, while the other side's moves by `other_shift`.
inline void raise(OnlineSum& a, double shift, double other_shift, double log2_scale) {
  if (a.z == 0) return;
  const double f = __builtin_exp2(shift * log2_scale);
  a.moment = (a.moment + a.z * (shift - other_shift)) * f;
  a.own = (a.own + a.z * shift) * f;
  a.z *= f;
}

// e * difference, and 0 where e is 0: a class without probability contributes nothing even at -inf.
inline vf weigh(vf e, vf difference) { return e == 0.0f ? set1(0.0f) : e * difference; }

struct KdSums {
  OnlineSum s, t;
  double z_hard = 0;  // sum exp(s - max_s) at T = 1
};

// Adds one chunk to the running sums. kOfTeacher: whose expectation of the difference is wanted (the teacher's for kl and ce, the
// student's for reverse_kl).
template <bool kOfTeacher, bool kEntropy, bool kHard, typename T>
inline void kd_accumulate(KdSums& sums, const T* s, const T* t, int64_t n, float log2_scale) {
  const float ninf = -__builtin_inff();
  vf max_s = set1(ninf), max_t = max_s;
  const auto raise_max = [&](Pair xs, Pair xt) {
    max_s = vmax(xs.b, vmax(xs.a, max_s));
    max_t = vmax(xt.b, vmax(xt.a, max_t));
  };
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) raise_max(load_pair(s + i), load_pair(t + i));
  if (i < n) raise_max(load_pair_n(s + i, n - i, ninf), load_pair_n(t + i, n - i, ninf));
  const float old_s = finite(sums.s.max), old_t = finite(sums.t.max);
  const float seen_s = max(max_s), seen_t = max(max_t);
  if (seen_s > sums.s.max) sums.s.max = seen_s;
  if (seen_t > sums.t.max) sums.t.max = seen_t;
  const float new_s = finite(sums.s.max), new_t = finite(sums.t.max);
  if (new_s > old_s || new_t > old_t) {
    const double shift_s = static_cast<double>(old_s) - new_s, shift_t = static_cast<double>(old_t) - new_t;
    raise(sums.s, shift_s, shift_t, log2_scale);
    raise(sums.t, shift_t, shift_s, log2_scale);
    if (kHard) sums.z_hard *= __builtin_exp2(shift_s * kLog2E);
  }
  const vf ms = set1(new_s), mt = set1(new_t);

  const vf scale = set1(log2_scale), log2e = set1(kLog2E);
  vf z_s = set1(0.0f), z_t = z_s, z_hard = z_s, moment = z_s, own = z_s;
  const auto add = [&](vf xs, vf xt) {
    const vf ds = xs - ms, dt = xt - mt;
    const vf es = exp2_scaled(ds, scale), et = exp2_scaled(dt, scale);
    z_s += es;
    z_t += et;
    moment += kOfTeacher ? weigh(et, dt - ds) : weigh(es, ds - dt);
    if (kEntropy) own += weigh(et, dt);
    if (kHard) z_hard += exp2_scaled(ds, log2e);
  };
  const auto add_pair = [&](Pair xs, Pair xt) {
    add(xs.a, xt.a);
    add(xs.b, xt.b);
  };
  for (i = 0; i + 2 * W <= n; i += 2 * W) {
    kd_prefetch(s + i);
    kd_prefetch(t + i);
    add_pair(load_pair(s + i), load_pair(t + i));
  }
  if (i < n) add_pair(load_pair_n(s + i, n - i, ninf), load_pair_n(t + i, n - i, ninf));
  sums.s.z += sum_wide(z_s);
  sums.t.z += sum_wide(z_t);
  (kOfTeacher ? sums.t : sums.s).moment += sum_wide(moment);
  if (kEntropy) sums.t.own += sum_wide(own);
  if (kHard) sums.z_hard += sum_wide(z_hard);
}

// The mean of f under weights p, lane by lane, kept up as they come. Gradients are p (f - mean): where f is the same wherever there is
// probability, as in a jsd whose sides do not overlap, the mean is that very number and the gradient exactly 0. A sum of rounded
// p f, with p that add up to 1 but for rounding, would leave a residue.
struct LaneMean {
  vf weight = set1(0.0f), mean = set1(0.0f);

  void add(vf p, vf f) {
    weight += p;
    mean = p == 0.0f ? mean : fma(p / weight, f - mean, mean);
  }
};

// What jsd and tv need from both normalisers on, for their second sweep and their gradient.
struct KdSweep {
  vf scale, max_s, max_t, inv_z_s, inv_z_t, log_ratio, inv_t, beta;
};

// log(m / p_s) and log(m / p_t) from d = log p_t - log p_s, m = beta p_t + (1 - beta) p_s. They are taken relative to the larger of
// the two, so nothing overflows and no logarithm meets a probability that underflowed.
struct LogMixture {
  vf over_s, over_t;
};

inline LogMixture log_mixture(const KdSweep& k, vf d) {
  const vf share = d > 0.0f ? 1.0f - k.beta : k.beta;
  const vf over_larger = log1p(share * expm1(-vabs(d)));
  return {d > 0.0f ? over_larger + d : over_larger, d > 0.0f ? over_larger : over_larger - d};
}

// Adds to `loss` and `aux` what W classes contribute.
inline void jsd_terms(const KdSweep& k, vf xs, vf xt, vf& loss, LaneMean& aux) {
  const vf ps = exp2_scaled(xs - k.max_s, k.scale) * k.inv_z_s, pt = exp2_scaled(xt - k.max_t, k.scale) * k.inv_z_t;
  const LogMixture m = log_mixture(k, fma((xt - k.max_t) - (xs - k.max_s), k.inv_t, k.log_ratio));
  loss -= (1.0f - k.beta) * weigh(ps, m.over_s) + k.beta * weigh(pt, m.over_t);
  aux.add(ps, -m.over_s);
}

inline vf half_sign(vf x) { return x > 0.0f ? set1(0.5f) : x < 0.0f ? set1(-0.5f) : set1(0.0f); }

inline void tv_terms(const KdSweep& k, vf xs, vf xt, vf& loss, LaneMean& aux) {
  const vf ps = exp2_scaled(xs - k.max_s, k.scale) * k.inv_z_s, pt = exp2_scaled(xt - k.max_t, k.scale) * k.inv_z_t;
  const vf difference = ps - pt;
  loss += 0.5f * vabs(difference);
  aux.add(ps, half_sign(difference));
}

inline KdSweep kd_sweep(const KdLoss& op, const float* stats, float temperature) {
  // log(p_t / p_s) = (t - max_t - s + max_s) / T + log(Z_s / Z_t)
  const double log_ratio = __builtin_log(static_cast<double>(stats[kInvZT]) / stats[kInvZS]);
  return {set1(static_cast<float>(1.4426950408889634 / temperature)), set1(stats[kMaxS]), set1(stats[kMaxT]),
          set1(stats[kInvZS]), set1(stats[kInvZT]), set1(static_cast<float>(log_ratio)), set1(1.0f / temperature), set1(op.beta)};
}

// Classes from `apart` on are summed apart from those before: a term that outweighs the others costs them no digits.
template <bool kOfTeacher, bool kEntropy, bool kHard>
inline KdSums kd_sums(const KdLoss& op, const KdRow& row, float log2_scale, int64_t apart) {
  return with_logit(op, [&]<typename T>() {
    alignas(64) float buffer_s[kKdChunk], buffer_t[kKdChunk];
    KdSums sums;
    for (int64_t c = 0, n; c < op.classes; c += n) {
      n = (c < apart ? apart : op.classes) - c;
      if (n > kKdChunk) n = kKdChunk;
      kd_accumulate<kOfTeacher, kEntropy, kHard>(sums, kd_chunk<T>(row.student, row.offset_s, c, n, buffer_s),
                                                 kd_chunk<T>(row.teacher, row.offset_t, c, n, buffer_t), n, log2_scale);
    }
    return sums;
  });
}

inline KdSums kd_sums(const KdLoss& op, const KdRow& row, float scale, bool hard, int64_t apart) {
  switch (op.kind) {
    case kReverseKl: return hard ? kd_sums<false, false, true>(op, row, scale, apart) : kd_sums<false, false, false>(op, row, scale, apart);
    case kCe: return hard ? kd_sums<true, true, true>(op, row, scale, apart) : kd_sums<true, true, false>(op, row, scale, apart);
    default: return hard ? kd_sums<true, false, true>(op, row, scale, apart) : kd_sums<true, false, false>(op, row, scale, apart);
  }
}

inline float kd_temperature(const KdLoss& op, int64_t row) { return op.row_temperature ? op.row_temperature[row] : op.temperature; }

inline bool kd_labelled(const KdLoss& op, int64_t row) { return op.labels && op.labels[row] != op.ignore_index; }

// A jsd whose mixture is one of its two sides: 0 everywhere.
inline bool kd_flat(const KdLoss& op) { return op.kind == kJsd && (op.beta == 0 || op.beta == 1); }

void kd_loss_forward_row(const KdLoss& op, int64_t r, int64_t apart = 0) {
  float* stats = op.stats + r * kKdStats;
  if (op.mask && !op.mask[r]) {
    for (int i = 0; i < kKdStats; ++i) stats[i] = 0;
    return;
  }
  const KdRow row = kd_row(op, r);
  const double temperature = kd_temperature(op, r);
  const bool labelled = kd_labelled(op, r), hard = labelled && temperature != 1;
  const float log2_scale = static_cast<float>(1.4426950408889634 / temperature);
  const KdSums sums = kd_sums(op, row, log2_scale, hard, apart);
  const double z_hard = hard ? sums.z_hard : sums.s.z;
  stats[kMaxS] = sums.s.max;
  stats[kMaxT] = sums.t.max;
  stats[kInvZS] = static_cast<float>(1 / sums.s.z);
  stats[kInvZT] = static_cast<float>(1 / sums.t.z);
  stats[kInvZHard] = static_cast<float>(1 / z_hard);
  stats[kAux] = 0;

  // lse_t - lse_s, the maxima aside, which the moments leave out too: no difference of two rounded logarithms
  const double lse_gap = __builtin_log(sums.t.z / sums.s.z);
  double soft;
  if (op.kind == kReverseKl) {
    soft = sums.s.moment / sums.s.z / temperature + lse_gap;
    stats[kAux] = static_cast<float>(soft);
  } else if (op.kind == kKl || op.kind == kCe) {
    soft = sums.t.moment / sums.t.z / temperature - lse_gap;
    if (op.kind == kCe) soft += __builtin_log(sums.t.z) - sums.t.own / sums.t.z / temperature;  // the teacher's entropy
  } else if (kd_flat(op)) {
    soft = 0;
  } else {
    const KdSweep sweep = kd_sweep(op, stats, static_cast<float>(temperature));
    alignas(64) float buffer_s[kKdChunk], buffer_t[kKdChunk];
    const float ninf = -__builtin_inff();
    double aux = 0, weight = 0;
    soft = 0;
    for (int64_t c = 0; c < op.classes; c += kKdChunk) {
      const int64_t n = op.classes - c < kKdChunk ? op.classes - c : kKdChunk;
      const float* s = kd_chunk(row.student, row.offset_s, c, n, buffer_s);
      const float* t = kd_chunk(row.teacher, row.offset_t, c, n, buffer_t);
      vf loss = set1(0.0f);
      LaneMean mean;
      for (int64_t i = 0; i < n; i += W) {
        const vf xs = i + W <= n ? load(s + i) : load_n(s + i, n - i, ninf);
        const vf xt = i + W <= n ? load(t + i) : load_n(t + i, n - i, ninf);
        op.kind == kJsd ? jsd_terms(sweep, xs, xt, loss, mean) : tv_terms(sweep, xs, xt, loss, mean);
      }
      soft += sum_wide(loss);
      for (int l = 0; l < W; ++l) {
        aux += static_cast<double>(mean.weight[l]) * mean.mean[l];
        weight += mean.weight[l];
      }
    }
    stats[kAux] = static_cast<float>(aux / weight);
  }
  stats[kSoftLoss] = static_cast<float>(op.scale_t2 ? soft * temperature * temperature : soft);
  stats[kHardLoss] = 0;
  if (labelled) {
    float buffer;
    const float target = *kd_chunk(row.student, row.offset_s, op.labels[r], 1, &buffer);
    stats[kHardLoss] = static_cast<float>(__builtin_log(z_hard) - (static_cast<double>(target) - sums.s.max));
  }
}

// The gradient of W logits at once, of one row or of W rows: every parameter is a vector. `hard_coef` carries 1 / Z_s(T = 1).
struct KdGradient {
  KdSweep k;
  vf aux, coef, hard_coef;

  template <Kind kKind, bool kHard>
  vf at(vf xs, vf xt) const {
    const vf es = exp2_scaled(xs - k.max_s, k.scale);
    vf y;
    if (kKind == kKl) {
      y = es * (k.inv_z_s * coef) - exp2_scaled(xt - k.max_t, k.scale) * (k.inv_z_t * coef);
    } else if (kKind == kTv) {
      const vf difference = es * k.inv_z_s - exp2_scaled(xt - k.max_t, k.scale) * k.inv_z_t;
      y = weigh(es * (k.inv_z_s * coef), half_sign(difference) - aux);
    } else {
      const vf d = fma((xt - k.max_t) - (xs - k.max_s), k.inv_t, k.log_ratio);
      if (kKind == kReverseKl) {
        y = weigh(es * (k.inv_z_s * coef), -d - aux);
      } else {
        y = weigh(es * (k.inv_z_s * coef * (1.0f - k.beta)), -log_mixture(k, d).over_s - aux);
      }
    }
    return kHard ? fma(exp2_scaled(xs - k.max_s, set1(kLog2E)), hard_coef, y) : y;
  }
};

// Calls f.template operator()<kind>() with the kind as a constant; ce has kl's gradient.
template <typename F>
inline void with_gradient_kind(Kind kind, const F& f) {
  switch (kind) {
    case kReverseKl: return f.template operator()<kReverseKl>();
    case kJsd: return f.template operator()<kJsd>();
    case kTv: return f.template operator()<kTv>();
    default: return f.template operator()<kKl>();
  }
}

template <Kind kKind, bool kHard, typename T>
inline void kd_gradient(const KdGradient& from, const T* s, const T* t, T* g, int64_t n, bool past_cache) {
  const KdGradient gradient = from;  // a copy that stores to g cannot change
  const auto at = [&](Pair xs, Pair xt) { return Pair{gradient.at<kKind, kHard>(xs.a, xt.a), gradient.at<kKind, kHard>(xs.b, xt.b)}; };
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    kd_prefetch(s + i);
    kd_prefetch(t + i);
    const Pair y = at(load_pair(s + i), load_pair(t + i));
    past_cache ? stream_pair(g + i, y) : store_pair(g + i, y);
  }
  if (i < n) store_pair_n(g + i, at(load_pair_n(s + i, n - i, 0.0f), load_pair_n(t + i, n - i, 0.0f)), n - i);
}

// The gradient of one row, written as T: its own type, or floats that from_floats takes there.
template <Kind kKind, bool kHard, typename T>
inline void kd_gradient_row(const KdLoss& op, const KdRow& row, const KdGradient& gradient, int64_t r, float hard) {
  alignas(64) float buffer_s[kKdChunk], buffer_t[kKdChunk], buffer_g[kKdChunk];
  const bool direct = !__is_same(T, float) || op.student.dtype == DType::kF32;
  T* const out = static_cast<T*>(op.grad_student) + r * op.classes;
  // Past the caches go whole lines: the first chunk ends where one begins.
  const int64_t head = op.past_cache && direct ? -reinterpret_cast<uintptr_t>(out) % 64 / sizeof(T) : 0;
  for (int64_t c = 0, n; c < op.classes; c += n) {
    const int64_t most = c == 0 && head > 0 ? head : kKdChunk;
    n = op.classes - c < most ? op.classes - c : most;
    T* g = direct ? out + c : reinterpret_cast<T*>(buffer_g);
    kd_gradient<kKind, kHard>(gradient, kd_chunk<T>(row.student, row.offset_s, c, n, buffer_s),
                              kd_chunk<T>(row.teacher, row.offset_t, c, n, buffer_t), g, n, op.past_cache && direct);
    if constexpr (kHard)
      if (op.labels[r] >= c && op.labels[r] < c + n) g[op.labels[r] - c] -= hard;
    if constexpr (__is_same(T, float))
      if (!direct) from_floats(g, n, op.grad_student, op.student.dtype, r * op.classes + c);
  }
}

void kd_loss_backward_row(const KdLoss& op, const KdWeights& weights, int64_t r) {
  if (op.mask && !op.mask[r]) {
    const int64_t bytes = op.classes * (op.student.dtype == DType::kF32 ? 4 : 2);
    __builtin_memset(static_cast<char*>(op.grad_student) + r * bytes, 0, bytes);
    return;
  }
  const float* stats = op.stats + r * kKdStats;
  const KdRow row = kd_row(op, r);
  const float upstream = kd_upstream(op, r);
  const float temperature = kd_temperature(op, r);
  KdSweep sweep = kd_sweep(op, stats, temperature);
  // d(T^2 L)/ds carries T^2 / T; an infinite reverse_kl has no useful direction, its gradient is 0
  const bool flat = kd_flat(op) || (op.kind == kReverseKl && stats[kAux] == __builtin_inff());
  const float coef = flat ? 0 : upstream * weights.soft * (op.scale_t2 ? temperature : 1 / temperature);
  const float hard = upstream * weights.hard;
  if (flat) sweep.inv_z_s = set1(0.0f);
  const KdGradient gradient{sweep, set1(stats[kAux]), set1(coef), set1(hard * stats[kInvZHard])};
  with_gradient_kind(op.kind, [&]<Kind kKind>() {
    // The label's 1 is taken off before rounding, so labelled rows are floats until then.
    if (kd_labelled(op, r)) return kd_gradient_row<kKind, true, float>(op, row, gradient, r, hard);
    with_logit(op, [&]<typename T>() { kd_gradient_row<kKind, false, T>(op, row, gradient, r, 0); });
  });
}

inline int64_t kd_last(const KdLoss& op, int64_t item) {
  const int64_t rows = op.outer * op.inner, end = (item + 1) * kd_rows_per_item(op);
  return end < rows ? end : rows;
}
