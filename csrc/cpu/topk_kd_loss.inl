// topk_kd_loss on the CPU: rows of logits and K named classes in; backward writes the dense gradient.
//
// Floor: one read of V floats forward, one read and one write backward. A row is walked in chunks that stay in the L1 cache. In a
// chunk the named classes are set to -inf before its exponentials are added up, so the rest's sum is its own and never the difference
// of two rounded ones. K + 1 logits then go through kd_loss's row. Backward spreads the rest's gradient over its classes in proportion
// to their exponentials, and puts the named ones in their places while the chunk is in L1.

inline int64_t topk_chunks(const TopkKdLoss& op) { return (op.classes + kKdChunk - 1) / kKdChunk; }

// Per row: where each chunk's named classes begin, and their numbers k in the order of chunks.
int64_t topk_scratch(const TopkKdLoss& op) { return topk_chunks(op) + 1 + op.count; }

inline int64_t topk_class(const TopkKdLoss& op, int64_t r, int64_t k) {
  const int64_t at = r / op.named.inner * op.index_stride_outer + r % op.named.inner * op.index_stride_inner + k * op.index_stride_class;
  return op.wide ? static_cast<const int64_t*>(op.indices)[at] : static_cast<const int32_t*>(op.indices)[at];
}

inline int64_t topk_offset(const TopkKdLoss& op, const LogitsView& x, int64_t r) {
  return r / op.named.inner * x.stride_outer + r % op.named.inner * x.stride_inner;
}

// The named classes of a row, chunk by chunk.
struct NamedByChunk {
  int32_t* begin;
  int32_t* order;

  template <typename F>
  void visit(int64_t chunk, const F& f) const {
    for (int32_t i = begin[chunk]; i < begin[chunk + 1]; ++i) f(order[i]);
  }
};

inline NamedByChunk named_by_chunk(const TopkKdLoss& op, int64_t r, float* scratch) {
  const int64_t chunks = topk_chunks(op);
  int32_t* begin = reinterpret_cast<int32_t*>(scratch);
  int32_t* order = begin + chunks + 1;
  for (int64_t c = 0; c <= chunks; ++c) begin[c] = 0;
  for (int64_t k = 0; k < op.count; ++k) ++begin[topk_class(op, r, k) / kKdChunk];
  for (int64_t c = 1; c <= chunks; ++c) begin[c] += begin[c - 1];
  for (int64_t k = op.count - 1; k >= 0; --k) order[--begin[topk_class(op, r, k) / kKdChunk]] = static_cast<int32_t>(k);
  return {begin, order};
}

// Sums of exponentials of the rest's logits relative to their running maximum, at T and at 1.
struct RestSums {
  float max = -__builtin_inff();
  double z = 0, z_hard = 0;
};

// `ahead`: where the next chunk will be read.
template <bool kHard>
inline void add_rest(RestSums& sums, const float* s, const float* ahead, int64_t n, float log2_scale) {
  const float ninf = -__builtin_inff();
  vf chunk_max[4] = {set1(ninf), set1(ninf), set1(ninf), set1(ninf)};
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W)
    for (int j = 0; j < 4; ++j) chunk_max[j] = vmax(load(s + i + j * W), chunk_max[j]);
  for (; i < n; i += W) chunk_max[0] = vmax(load_n(s + i, n - i < W ? n - i : W, ninf), chunk_max[0]);
  const float old = finite(sums.max), seen = max(vmax(vmax(chunk_max[0], chunk_max[1]), vmax(chunk_max[2], chunk_max[3])));
  if (seen > sums.max) sums.max = seen;
  const float reference = finite(sums.max);
  if (reference > old) {
    const double shift = static_cast<double>(old) - reference;
    sums.z *= __builtin_exp2(shift * log2_scale);
    if (kHard) sums.z_hard *= __builtin_exp2(shift * kLog2E);
  }
  const vf m = set1(reference), scale = set1(log2_scale), log2e = set1(kLog2E);
  vf z = set1(0.0f), z_hard = z;
  const auto add = [&](vf x) {
    z += exp2_scaled(x - m, scale);
    if (kHard) z_hard += exp2_scaled(x - m, log2e);
  };
  for (i = 0; i + W <= n; i += W) {
    __builtin_prefetch(ahead + i);
    add(load(s + i));
  }
  if (i < n) add(load_n(s + i, n - i, ninf));
  sums.z += sum_wide(z);
  if (kHard) sums.z_hard += sum_wide(z_hard);
}

template <bool kHard>
inline RestSums rest_sums(const TopkKdLoss& op, const NamedByChunk& named, int64_t r, float log2_scale) {
  alignas(64) float buffer[kKdChunk];
  const int64_t offset = topk_offset(op, op.student, r);
  RestSums sums;
  for (int64_t c = 0; c < op.classes; c += kKdChunk) {
    const int64_t n = op.classes - c < kKdChunk ? op.classes - c : kKdChunk, chunk = c / kKdChunk;
    const float *s = kd_chunk(op.student, offset, c, n, buffer), *ahead = s + kKdChunk;
    if (named.begin[chunk] < named.begin[chunk + 1]) {
      if (s != buffer) __builtin_memcpy(buffer, s, n * sizeof(float));
      named.visit(chunk, [&](int64_t k) { buffer[topk_class(op, r, k) - c] = -__builtin_inff(); });
      s = buffer;
    }
    add_rest<kHard>(sums, s, ahead, n, log2_scale);
  }
  return sums;
}

// The teacher's logits over K + 1 outcomes, for a softmax at T.
inline void teacher_outcomes(const TopkKdLoss& op, int64_t r, float temperature) {
  float* t = op.named_teacher + r * (op.count + 1);
  const int64_t offset = topk_offset(op, op.values, r);
  for (int64_t k = 0; k < op.count; k += kKdChunk) {
    const int64_t n = op.count - k < kKdChunk ? op.count - k : kKdChunk;
    const float* x = kd_chunk(op.values, offset, k, n, t + k);
    if (x != t + k) __builtin_memcpy(t + k, x, n * sizeof(float));
  }
  t[op.count] = -__builtin_inff();
  if (!op.bucket) return;
  double mass = 0;
  for (int64_t k = 0; k < op.count; k += W) {
    const int64_t n = op.count - k < W ? op.count - k : W;
    const vf x = load_n(t + k, n, -__builtin_inff());
    mass += sum_wide(exp2_scaled(x, set1(kLog2E)));
    store_n(t + k, x * temperature, n);
  }
  if (op.count < op.classes && mass < 1) t[op.count] = static_cast<float>(temperature * __builtin_log1p(-mass));
}

inline float student_logit(const TopkKdLoss& op, int64_t offset, int64_t c) {
  float buffer;
  return *kd_chunk(op.student, offset, c, 1, &buffer);
}

// f(first, n, the row's n <= W named logits from there on), as they are: relative to the rest's logit, which is T log Z above the rest's
// maximum, they are too far away for the digits that T = 1 asks for.
template <typename F>
inline void for_named_logits(const TopkKdLoss& op, int64_t r, const F& f) {
  const int64_t offset = topk_offset(op, op.student, r);
  for (int64_t k = 0; k < op.count; k += W) {
    const int64_t n = op.count - k < W ? op.count - k : W;
    float x[W];
    for (int64_t i = 0; i < W; ++i) x[i] = i < n ? student_logit(op, offset, topk_class(op, r, k + i)) : -__builtin_inff();
    f(k, n, load(x));
  }
}

// The sum of exponentials of the whole row at T = 1, from the named logits and the rest's sum: as a maximum and 1 / sum.
inline void hard_sum(const TopkKdLoss& op, const RestSums& sums, int64_t r, float* rest) {
  vf seen = set1(sums.max);
  for_named_logits(op, r, [&](int64_t, int64_t, vf x) { seen = vmax(x, seen); });
  const float m = finite(max(seen));
  double z = sums.z_hard == 0 ? 0 : sums.z_hard * __builtin_exp(static_cast<double>(sums.max) - m);
  for_named_logits(op, r, [&](int64_t, int64_t, vf x) { z += sum_wide(exp2_scaled(x - m, set1(kLog2E))); });
  rest[kHardMax] = m;
  rest[kHardInvZ] = static_cast<float>(1 / z);
}

inline bool topk_labelled(const TopkKdLoss& op, int64_t r) { return op.labels && op.labels[r] != op.ignore_index; }

inline void topk_forward_row(const TopkKdLoss& op, int64_t r, float* scratch) {
  const int64_t outcomes = op.count + 1, offset = topk_offset(op, op.student, r);
  float* s = op.named_student + r * outcomes;
  float* rest = op.rest + r * kTopkStats;
  for (int i = 0; i < kTopkStats; ++i) rest[i] = 0;
  if (op.named.mask && !op.named.mask[r]) {
    for (int64_t k = 0; k < outcomes; ++k) s[k] = op.named_teacher[r * outcomes + k] = 0;
    return kd_loss_forward_row(op.named, r);
  }
  const float temperature = kd_temperature(op.named, r);
  const float log2_scale = static_cast<float>(1.4426950408889634 / temperature);
  const bool labelled = topk_labelled(op, r);
  const NamedByChunk named = named_by_chunk(op, r, scratch);
  const RestSums sums = labelled ? rest_sums<true>(op, named, r, log2_scale) : rest_sums<false>(op, named, r, log2_scale);
  // Relative to the rest's logit, whose rounding would otherwise be the largest error of the loss.
  const double above = sums.z == 0 ? 0 : temperature * __builtin_log(sums.z), reference = sums.z == 0 ? 0 : sums.max + above;
  for (int64_t k = 0; k < op.count; ++k) s[k] = static_cast<float>(student_logit(op, offset, topk_class(op, r, k)) - reference);
  s[op.count] = sums.z == 0 ? -__builtin_inff() : static_cast<float>(reference - reference);  // NaN stays
  rest[kRestMax] = finite(sums.max);
  rest[kRestInvZ] = sums.z == 0 ? 0 : static_cast<float>(1 / sums.z);
  teacher_outcomes(op, r, temperature);
  kd_loss_forward_row(op.named, r, op.count);
  if (!labelled) return;
  hard_sum(op, sums, r, rest);
  const double of_label = student_logit(op, offset, op.labels[r]);
  op.named.stats[r * kKdStats + kHardLoss] = static_cast<float>(-__builtin_log(rest[kHardInvZ]) - (of_label - rest[kHardMax]));
}

// A row of the gradient is what the rest's classes share, exp((s - max) / T) times `soft` and exp(s - max) times `hard`.
template <bool kHard>
inline void spread_rest(const float* s, float* g, int64_t n, float max, float log2_scale, float soft, float hard) {
  const vf m = set1(max), scale = set1(log2_scale), log2e = set1(kLog2E);
  const auto at = [&](vf x) {
    const vf d = (x > m ? m : x) - m;  // named classes may lie above the rest's maximum; their values are replaced
    const vf y = exp2_scaled(d, scale) * soft;
    return kHard ? fma(exp2_scaled(d, log2e), set1(hard), y) : y;
  };
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    __builtin_prefetch(s + i + kKdChunk);
    store(g + i, at(load(s + i)));
  }
  if (i < n) store_n(g + i, at(load_n(s + i, n - i, 0.0f)), n - i);
}

// A chunk from L1 to where nobody reads it soon, in whole vectors of the target.
inline void store_past_cache(const float* g, int64_t n, float* to) {
  int64_t i = -reinterpret_cast<uintptr_t>(to) % sizeof(vf) / sizeof(float);
  if (i > n) i = n;
  store_n(to, load(g), i);
  for (; i + W <= n; i += W) stream(to + i, load(g + i));
  if (i < n) store_n(to + i, load_n(g + i, n - i, 0.0f), n - i);
}

// The gradient of the rest's logit. Gradients of all outcomes add up to 0: where the rest is most of the mass, that keeps the digits
// that p_s - p_t would lose.
inline float gradient_of_rest(const TopkKdLoss& op, const float* named, const float* stats) {
  if (stats[kMaxS] > 0 || stats[kInvZS] < 0.5f) return named[op.count];
  double total = 0;
  for (int64_t k = 0; k < op.count; k += W) total -= sum_wide(load_n(named + k, op.count - k < W ? op.count - k : W, 0.0f));
  return static_cast<float>(total);
}

inline void topk_backward_row(const TopkKdLoss& op, const KdWeights& weights, int64_t r, float* scratch) {
  kd_loss_backward_row(op.named, weights, r);
  const float* rest = op.rest + r * kTopkStats;
  float* g_named = static_cast<float*>(op.named.grad_student) + r * (op.count + 1);
  const bool real = !(op.named.mask && !op.named.mask[r]), labelled = real && topk_labelled(op, r);
  const float upstream =
      op.named.grad_loss[r / op.named.inner * op.named.grad_stride_outer + r % op.named.inner * op.named.grad_stride_inner];
  const float temperature = kd_temperature(op.named, r), log2_scale = static_cast<float>(1.4426950408889634 / temperature);
  const float hard = labelled ? upstream * weights.hard : 0, hard_named = hard * rest[kHardInvZ];
  const float rest_to_all = static_cast<float>(__builtin_exp(static_cast<double>(rest[kRestMax]) - rest[kHardMax]));
  const float hard_rest = labelled ? hard_named * rest_to_all : 0;
  const float soft_rest = gradient_of_rest(op, g_named, op.named.stats + r * kKdStats) * rest[kRestInvZ];
  if (labelled) {
    const vf m = set1(rest[kHardMax]);
    for_named_logits(op, r, [&](int64_t k, int64_t n, vf x) {
      store_n(g_named + k, fma(exp2_scaled(x - m, set1(kLog2E)), set1(hard_named), load_n(g_named + k, n, 0.0f)), n);
    });
  }

  const int64_t offset = topk_offset(op, op.student, r), out = r * op.classes;
  const bool direct = op.student.dtype == DType::kF32;
  const NamedByChunk named = real ? named_by_chunk(op, r, scratch) : NamedByChunk{};
  alignas(64) float buffer_s[kKdChunk], g[kKdChunk];
  for (int64_t c = 0; c < op.classes; c += kKdChunk) {
    const int64_t n = op.classes - c < kKdChunk ? op.classes - c : kKdChunk;
    if (!real) {
      for (int64_t i = 0; i < n; ++i) g[i] = 0;
    } else {
      const float* s = kd_chunk(op.student, offset, c, n, buffer_s);
      labelled ? spread_rest<true>(s, g, n, rest[kRestMax], log2_scale, soft_rest, hard_rest)
               : spread_rest<false>(s, g, n, rest[kRestMax], log2_scale, soft_rest, 0);
      named.visit(c / kKdChunk, [&](int64_t k) { g[topk_class(op, r, k) - c] = g_named[k]; });
      if (labelled && op.labels[r] >= c && op.labels[r] < c + n) g[op.labels[r] - c] -= hard;
    }
    direct && op.past_cache ? store_past_cache(g, n, static_cast<float*>(op.grad_student) + out + c)
                            : from_floats(g, n, op.grad_student, op.student.dtype, out + c);
  }
  if (direct && op.past_cache) stream_end();
}

void topk_forward(const TopkKdLoss& op, int64_t item, float* scratch) {
  const int64_t rows = op.named.outer * op.named.inner, per_item = topk_rows_per_item(op);
  for (int64_t r = item * per_item; r < rows && r < (item + 1) * per_item; ++r) topk_forward_row(op, r, scratch);
}

void topk_backward(const TopkKdLoss& op, const KdWeights& weights, int64_t item, float* scratch) {
  const int64_t rows = op.named.outer * op.named.inner, per_item = topk_rows_per_item(op);
  for (int64_t r = item * per_item; r < rows && r < (item + 1) * per_item; ++r) topk_backward_row(op, weights, r, scratch);
}
