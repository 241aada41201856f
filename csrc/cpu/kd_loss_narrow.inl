// kd_loss for few classes (sequence classification: 4096 x 2): W rows at a time, one row per lane, since a row of its own would fill
// two lanes of a vector and pay three scalar logarithms. Same formulas as kd_loss.inl; sums stay in their lanes.

constexpr int64_t kKdNarrow = 64;  // classes; 2 x 64 x W floats are 8 KiB

// Up to W consecutive rows, and which of them are real.
struct KdLanes {
  int64_t first, count;
  vi32 real;  // -1 or 0
};

inline KdLanes kd_lanes(const KdLoss& op, int64_t first, int64_t last) {
  KdLanes lanes{first, last - first < W ? last - first : W, vi32{}};
  for (int64_t l = 0; l < W; ++l) lanes.real[l] = l < lanes.count && (!op.mask || op.mask[first + l]) ? -1 : 0;
  return lanes;
}

// W rows of 2^k columns that lie one after the other, turned into columns of W lanes: k times the lowest bit of an element's index becomes
// the highest, by taking even and odd elements apart. bf16 comes apart as it is loaded, so its first time is free.
template <typename T>
inline void kd_turn(const T* rows, int64_t columns, float* out) {
  const int64_t half = columns / 2;
  const auto put = [&](int64_t i, Pair x) {
    store(out + i * W, x.a);
    store(out + (half + i) * W, x.b);
  };
  for (int64_t i = 0; i < half; ++i) put(i, load_split(rows + 2 * W * i));
  for (int64_t n = 2; n < columns; n *= 2) {
    float before[kKdNarrow * W];
    __builtin_memcpy(before, out, columns * W * sizeof(float));
    for (int64_t i = 0; i < half; ++i) put(i, load_split(before + 2 * W * i));
  }
}

// And back; what is in `columns_in` is lost.
template <typename T>
inline void kd_turn_back(float* in, int64_t columns, T* rows) {
  const int64_t half = columns / 2;
  for (int64_t n = 2; n < columns; n *= 2) {
    float before[kKdNarrow * W];
    __builtin_memcpy(before, in, columns * W * sizeof(float));
    for (int64_t i = 0; i < half; ++i) store_joined(in + 2 * W * i, {load(before + i * W), load(before + (half + i) * W)});
  }
  for (int64_t i = 0; i < half; ++i) store_joined(rows + 2 * W * i, {load(in + i * W), load(in + (half + i) * W)});
}

// Whether kd_turn takes the classes of these rows.
inline bool kd_turns(const KdLoss& op, const KdLanes& lanes) {
  return lanes.count == W && op.classes > 1 && (op.classes & (op.classes - 1)) == 0;
}

inline bool kd_dense(const KdLoss& op, const LogitsView& x) {
  return x.stride_class == 1 && (op.inner == 1 || x.stride_inner == op.classes) &&
         (op.outer == 1 || x.stride_outer == op.inner * op.classes);
}

// Elements of rows to lanes: class c of lane l to out[c * W + l]; lanes that are not real hold 0.
template <typename T>
inline void kd_gather(const KdLoss& op, const LogitsView& x, const KdLanes& lanes, T* out) {
  for (int64_t l = 0; l < W; ++l) {
    const T* p = static_cast<const T*>(x.data) + (lanes.real[l] ? kd_offset(op, x, lanes.first + l) : 0);
    for (int64_t c = 0; c < op.classes; ++c) out[c * W + l] = lanes.real[l] ? p[c * x.stride_class] : T{};
  }
}

// The same in floats; lanes that are not real hold anything.
inline void kd_to_lanes(const KdLoss& op, const LogitsView& x, const KdLanes& lanes, float* out) {
  const int64_t offset = lanes.first * op.classes;
  if (kd_turns(op, lanes) && kd_dense(op, x)) {
    if (x.dtype == DType::kF32) return kd_turn(static_cast<const float*>(x.data) + offset, op.classes, out);
    if (x.dtype == DType::kBF16) return kd_turn(static_cast<const Bf16*>(x.data) + offset, op.classes, out);
    return kd_turn(static_cast<const F16*>(x.data) + offset, op.classes, out);
  }
  if (x.dtype == DType::kF32) return kd_gather(op, x, lanes, out);
  uint16_t halves[kKdNarrow * W];
  kd_gather(op, x, lanes, halves);
  for (int64_t i = 0; i < op.classes * W; i += W)
    store(out + i, x.dtype == DType::kBF16 ? load_bf16(halves + i) : load_f16(halves + i));
}

// Back from lanes to consecutive rows of the gradient, which are 0 where they are not real. What is in g is lost.
template <typename T>
inline void kd_scatter(const KdLoss& op, const KdLanes& lanes, float* g) {
  T* rows = static_cast<T*>(op.grad_student) + lanes.first * op.classes;
  if (kd_turns(op, lanes)) return kd_turn_back(g, op.classes, rows);
  for (int64_t l = 0; l < lanes.count; ++l)
    for (int64_t c = 0; c < op.classes; ++c) *rows++ = from_float(g[c * W + l], T{});
}

inline void kd_from_lanes(const KdLoss& op, const KdLanes& lanes, float* g) {
  for (int64_t c = 0; c < op.classes; ++c) store(g + c * W, lanes.real ? load(g + c * W) : set1(0.0f));
  if (op.student.dtype == DType::kF32) return kd_scatter<float>(op, lanes, g);
  op.student.dtype == DType::kBF16 ? kd_scatter<Bf16>(op, lanes, g) : kd_scatter<F16>(op, lanes, g);
}

// Temperatures by lane.
inline vf kd_lane_temperatures(const KdLoss& op, const KdLanes& lanes) {
  return op.row_temperature ? load_n(op.row_temperature + lanes.first, lanes.count, 1.0f) : set1(op.temperature);
}

inline KdSweep kd_lane_sweep(const KdLoss& op, vf temperature, vf max_s, vf max_t, vf inv_z_s, vf inv_z_t) {
  return {kLog2E / temperature, max_s, max_t, inv_z_s, inv_z_t, log(inv_z_t / inv_z_s), 1.0f / temperature, set1(op.beta)};
}

void kd_loss_forward_lanes(const KdLoss& op, const KdLanes& lanes) {
  alignas(64) float s[kKdNarrow * W], t[kKdNarrow * W];
  kd_to_lanes(op, op.student, lanes, s);
  kd_to_lanes(op, op.teacher, lanes, t);
  const vf temperature = kd_lane_temperatures(op, lanes), inv_t = 1.0f / temperature, scale = kLog2E / temperature;
  vf max_s = set1(-__FLT_MAX__), max_t = max_s;
  for (int64_t c = 0; c < op.classes; ++c) {
    max_s = vmax(load(s + c * W), max_s);
    max_t = vmax(load(t + c * W), max_t);
  }
  const bool reverse = op.kind == kReverseKl, hard = op.labels != nullptr;
  vf z_s = set1(0.0f), z_t = z_s, z_hard = z_s, moment = z_s, own = z_s, aux = z_s;
  for (int64_t c = 0; c < op.classes; ++c) {
    const vf ds = load(s + c * W) - max_s, dt = load(t + c * W) - max_t;
    const vf es = exp2_scaled(ds, scale), et = exp2_scaled(dt, scale);
    z_s += es;
    z_t += et;
    moment += reverse ? weigh(es, ds - dt) : weigh(et, dt - ds);
    own += weigh(et, dt);
    if (hard) z_hard += exp2_scaled(ds, set1(kLog2E));
  }
  vf soft = set1(0.0f);
  const vf lse_gap = log(z_t / z_s);
  if (reverse) {
    soft = aux = moment / z_s * inv_t + lse_gap;
  } else if (op.kind == kKl) {
    soft = moment / z_t * inv_t - lse_gap;
  } else if (op.kind == kCe) {
    soft = moment / z_t * inv_t - lse_gap + (log(z_t) - own / z_t * inv_t);
  } else if (!kd_flat(op)) {
    const KdSweep sweep = kd_lane_sweep(op, temperature, max_s, max_t, 1.0f / z_s, 1.0f / z_t);
    LaneMean mean;
    for (int64_t c = 0; c < op.classes; ++c) {
      const vf xs = load(s + c * W), xt = load(t + c * W);
      op.kind == kJsd ? jsd_terms(sweep, xs, xt, soft, mean) : tv_terms(sweep, xs, xt, soft, mean);
    }
    aux = mean.mean;
  }
  if (op.scale_t2) soft = soft * temperature * temperature;
  // The cross-entropy is log z_hard + max_s - the label's logit.
  const vf columns[kKdStats] = {max_s, 1.0f / z_s, max_t, 1.0f / z_t, aux, 1.0f / z_hard, soft, log(z_hard) + max_s};
  alignas(64) float stat[kKdStats * W];
  for (int i = 0; i < kKdStats; ++i) store(stat + i * W, lanes.real ? columns[i] : set1(0.0f));
  for (int64_t l = 0; l < W; ++l) {
    float& loss = stat[kHardLoss * W + l];
    loss = hard && lanes.real[l] && kd_labelled(op, lanes.first + l) ? loss - s[op.labels[lanes.first + l] * W + l] : 0;
  }
  float* rows = op.stats + lanes.first * kKdStats;
  if (lanes.count == W) return kd_turn_back(stat, kKdStats, rows);
  for (int64_t l = 0; l < lanes.count; ++l)
    for (int i = 0; i < kKdStats; ++i) *rows++ = stat[i * W + l];
}

void kd_loss_backward_lanes(const KdLoss& op, const KdWeights& weights, const KdLanes& lanes) {
  alignas(64) float s[kKdNarrow * W], t[kKdNarrow * W], g[kKdNarrow * W];
  kd_to_lanes(op, op.student, lanes, s);
  kd_to_lanes(op, op.teacher, lanes, t);
  const vf temperature = kd_lane_temperatures(op, lanes), zero = set1(0.0f);
  alignas(64) float stat[kKdStats * W] = {}, upstream[W] = {}, hard[W] = {};
  const float* rows = op.stats + lanes.first * kKdStats;
  if (lanes.count == W) kd_turn(rows, kKdStats, stat);
  for (int64_t l = 0; l < lanes.count; ++l) {
    for (int i = 0; i < kKdStats && lanes.count < W; ++i) stat[i * W + l] = *rows++;
    upstream[l] = kd_upstream(op, lanes.first + l);
    if (lanes.real[l] && kd_labelled(op, lanes.first + l)) hard[l] = upstream[l] * weights.hard;
  }
  const vf inv_z_s = load(stat + kInvZS * W), aux = load(stat + kAux * W);
  KdSweep sweep = kd_lane_sweep(op, temperature, load(stat + kMaxS * W), load(stat + kMaxT * W), inv_z_s, load(stat + kInvZT * W));
  vf coef = load(upstream) * weights.soft * (op.scale_t2 ? temperature : 1.0f / temperature);
  if (op.kind == kReverseKl) {
    sweep.inv_z_s = aux == __builtin_inff() ? zero : inv_z_s;  // as in kd_loss_backward_row
    coef = aux == __builtin_inff() ? zero : coef;
  }
  if (kd_flat(op)) sweep.inv_z_s = coef = zero;
  const KdGradient gradient{sweep, aux, coef, load(hard) * load(stat + kInvZHard * W)};
  with_gradient_kind(op.kind, [&]<Kind kKind>() {
    for (int64_t c = 0; c < op.classes; ++c) {
      const vf xs = load(s + c * W), xt = load(t + c * W);
      store(g + c * W, op.labels ? gradient.at<kKind, true>(xs, xt) : gradient.at<kKind, false>(xs, xt));
    }
  });
  for (int64_t l = 0; l < lanes.count; ++l)
    if (lanes.real[l] && kd_labelled(op, lanes.first + l)) g[op.labels[lanes.first + l] * W + l] -= hard[l];
  kd_from_lanes(op, lanes, g);
}

void kd_loss_forward(const KdLoss& op, int64_t item) {
  int64_t r = item * kd_rows_per_item(op);
  if (op.classes <= kKdNarrow) {
    for (; r < kd_last(op, item); r += W) kd_loss_forward_lanes(op, kd_lanes(op, r, kd_last(op, item)));
  } else {
    for (; r < kd_last(op, item); ++r) kd_loss_forward_row(op, r);
  }
}

void kd_loss_backward(const KdLoss& op, const KdWeights& weights, int64_t item) {
  int64_t r = item * kd_rows_per_item(op);
  if (op.classes <= kKdNarrow) {
    for (; r < kd_last(op, item); r += W) kd_loss_backward_lanes(op, weights, kd_lanes(op, r, kd_last(op, item)));
  } else {
    for (; r < kd_last(op, item); ++r) kd_loss_backward_row(op, weights, r);
    stream_end();
  }
}
