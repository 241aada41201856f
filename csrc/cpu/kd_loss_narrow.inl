// kd_loss for few classes (sequence classification: 4096 x 2): W rows at a time, one row per lane, since a row of its own would fill
// two lanes of a vector and pay three scalar logarithms. Same formulas as kd_loss.inl; sums stay in their lanes.

constexpr int64_t kKdNarrow = 64;  // classes; 2 x 64 x W floats are 8 KiB

// Up to W consecutive rows: where they lie, and which of them are real.
struct KdLanes {
  int64_t first, count;
  int64_t offset_s[W], offset_t[W], grad_offset[W];
  bool real[W], labelled[W];
};

inline KdLanes kd_lanes(const KdLoss& op, int64_t first, int64_t last) {
  KdLanes lanes{};
  lanes.first = first;
  lanes.count = last - first < W ? last - first : W;
  int64_t o = first / op.inner, i = first % op.inner;
  for (int64_t l = 0; l < lanes.count; ++l) {
    lanes.offset_s[l] = o * op.student.stride_outer + i * op.student.stride_inner;
    lanes.offset_t[l] = o * op.teacher.stride_outer + i * op.teacher.stride_inner;
    lanes.grad_offset[l] = o * op.grad_stride_outer + i * op.grad_stride_inner;
    lanes.real[l] = !op.mask || op.mask[first + l];
    lanes.labelled[l] = lanes.real[l] && kd_labelled(op, first + l);
    if (++i == op.inner) i = 0, ++o;
  }
  return lanes;
}

// Elements of rows to lanes: class c of lane l to out[c * W + l]; lanes that are not real hold 0.
template <typename T>
inline void kd_to_lanes(const KdLoss& op, const LogitsView& x, const int64_t* offset, const KdLanes& lanes, T* out) {
  for (int64_t l = 0; l < W; ++l) {
    const bool read = l < lanes.count && lanes.real[l];
    const T* p = static_cast<const T*>(x.data) + (read ? offset[l] : 0);
    for (int64_t c = 0; c < op.classes; ++c) out[c * W + l] = read ? p[c * x.stride_class] : T{};
  }
}

inline void kd_transpose(const KdLoss& op, const LogitsView& x, const int64_t* offset, const KdLanes& lanes, float* out) {
  if (x.dtype == DType::kF32) return kd_to_lanes(op, x, offset, lanes, out);
  uint16_t halves[kKdNarrow * W];
  kd_to_lanes(op, x, offset, lanes, halves);
  for (int64_t i = 0; i < op.classes * W; i += W)
    store(out + i, x.dtype == DType::kBF16 ? load_bf16(halves + i) : load_f16(halves + i));
}

// Back from lanes to consecutive rows of the gradient; rows that are not real get 0.
template <typename T>
inline void kd_from_lanes(const KdLoss& op, const KdLanes& lanes, const T* g) {
  T* out = static_cast<T*>(op.grad_student) + lanes.first * op.classes;
  for (int64_t l = 0; l < lanes.count; ++l)
    for (int64_t c = 0; c < op.classes; ++c) *out++ = lanes.real[l] ? g[c * W + l] : T{};
}

// Temperatures by lane.
inline vf kd_lane_temperatures(const KdLoss& op, const KdLanes& lanes) {
  if (!op.row_temperature) return set1(op.temperature);
  float t[W];
  for (int64_t l = 0; l < W; ++l) t[l] = l < lanes.count && lanes.real[l] ? op.row_temperature[lanes.first + l] : 1;
  return load(t);
}

inline KdSweep kd_lane_sweep(const KdLoss& op, vf temperature, vf max_s, vf max_t, vf inv_z_s, vf inv_z_t) {
  return {kLog2E / temperature, max_s, max_t, inv_z_s, inv_z_t, log(inv_z_t / inv_z_s), 1.0f / temperature, set1(op.beta)};
}

void kd_loss_forward_lanes(const KdLoss& op, const KdLanes& lanes) {
  alignas(64) float s[kKdNarrow * W], t[kKdNarrow * W];
  kd_transpose(op, op.student, lanes.offset_s, lanes, s);
  kd_transpose(op, op.teacher, lanes.offset_t, lanes, t);
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
  for (int i = 0; i < kKdStats; ++i) store(stat + i * W, columns[i]);
  for (int64_t l = 0; l < lanes.count; ++l) {
    float* stats = op.stats + (lanes.first + l) * kKdStats;
    for (int i = 0; i < kKdStats; ++i) stats[i] = lanes.real[l] ? stat[i * W + l] : 0;
    stats[kHardLoss] = lanes.labelled[l] ? stats[kHardLoss] - s[op.labels[lanes.first + l] * W + l] : 0;
  }
}

void kd_loss_backward_lanes(const KdLoss& op, const KdWeights& weights, const KdLanes& lanes) {
  alignas(64) float s[kKdNarrow * W], t[kKdNarrow * W], g[kKdNarrow * W];
  kd_transpose(op, op.student, lanes.offset_s, lanes, s);
  kd_transpose(op, op.teacher, lanes.offset_t, lanes, t);
  const vf temperature = kd_lane_temperatures(op, lanes), zero = set1(0.0f);
  alignas(64) float stat[kKdStats * W] = {}, upstream[W] = {}, hard[W] = {};
  for (int64_t l = 0; l < lanes.count; ++l) {
    if (!lanes.real[l]) continue;
    for (int i = 0; i < kKdStats; ++i) stat[i * W + l] = op.stats[(lanes.first + l) * kKdStats + i];
    upstream[l] = op.grad_loss[lanes.grad_offset[l]];
    if (lanes.labelled[l]) hard[l] = upstream[l] * weights.hard;
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
    if (lanes.labelled[l]) g[op.labels[lanes.first + l] * W + l] -= hard[l];
  if (op.student.dtype == DType::kF32) return kd_from_lanes(op, lanes, g);
  uint16_t halves[kKdNarrow * W];
  for (int64_t i = 0; i < op.classes * W; i += W)
    op.student.dtype == DType::kBF16 ? store_bf16(halves + i, load(g + i)) : store_f16(halves + i, load(g + i));
  kd_from_lanes(op, lanes, halves);
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
