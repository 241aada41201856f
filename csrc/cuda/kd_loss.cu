// kd_loss on CUDA: the divergence of two softmaxes per row of logits, and its gradient.
//
//   x = logits / T, p = softmax(x), lse = log sum exp x, t the teacher, s the student
//   kl          sum p_t (x_t - x_s) - (lse_t - lse_s)      d/ds = (p_s - p_t) / T
//   ce          lse_s - sum p_t x_s                        d/ds = (p_s - p_t) / T
//   reverse_kl  L = sum p_s (x_s - x_t) - (lse_s - lse_t)  d/ds = p_s (log p_s - log p_t - L) / T
//   jsd         beta KL(p_t|m) + (1 - beta) KL(p_s|m)      d/ds = (1 - beta) p_s (log p_s - log m - KL(p_s|m)) / T
//   tv          sum |p_s - p_t| / 2                        d/ds = p_s (g - sum p_s g) / T, g = sign(p_s - p_t) / 2
//   with labels, the cross-entropy at T = 1 in the same pass
//
// Bytes are the limit: forward reads both logits once and leaves 32 bytes a row, backward reads them again and writes the
// gradient, 5 R V e in all. 512 x 30522 in bf16 is 156 MB, 33 us at 4.8 TB/s. Two exponentials a class are 10 of the 16 that an
// SM of an H200 does per clock while bf16 arrives at full bandwidth, so a class is kept to few instructions: base-2 exponents
// with log2(e) / T folded in, and sums taken online against a reference that moves only when a logit outgrows it by 2^8.
// jsd and tv need both normalisers before the first term: they read the row a second time, from L2 where it fits.
//
// The statistics are those of ops/kd_loss.h, but for two: the "max" is the reference of the sums, and kAux of reverse_kl and jsd
// is the mean of their exponents' differences, so that backward subtracts like from like.
//
// A row belongs to a thread, to some lanes of a warp or to a block, as long as it is; row losses are then added in a fixed order.
// A label outside [0, classes) or a temperature that is not positive cannot raise here: that row's loss is NaN.
#include "kd_loss.h"

#include <limits>
#include <type_traits>

#include "group.h"
#include "launch.h"
#include "row.h"

namespace kd::cuda {
namespace {

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kSlack = 8.f;      // octaves that a logit may lie above the reference of the online sums
constexpr float kDead = -1e30f;    // log2 of probability 0, finite so that differences of two are
constexpr int kMaxThreads = 512;
constexpr int kRowsPerSum = 8192;  // rows whose losses one block adds up
constexpr int kSumThreads = 512;

template <Kind kind>
constexpr bool kOneSweep = kind == kKl || kind == kCe || kind == kReverseKl;

// Which row the thread works on, and with how many others. Lanes without a real row run along, for the shuffles.
struct Place {
  int64_t row;
  int lane, lanes;
  bool exists, real;

  __device__ Place(const KdLoss& op, int lanes) : lane(threadIdx.x % lanes), lanes(lanes) {
    row = int64_t(blockIdx.x) * (blockDim.x / lanes) + threadIdx.x / lanes;
    exists = row < op.outer * op.inner;
    real = exists && (op.mask == nullptr || op.mask[row]);
  }

  __device__ int64_t offset(const KdLoss& op, int64_t stride_outer, int64_t stride_inner) const {
    return row / op.inner * stride_outer + row % op.inner * stride_inner;
  }
};

template <class T>
__device__ const T* row_data(const LogitsView& view, const KdLoss& op, const Place& at) {
  return static_cast<const T*>(view.data) + (at.real ? at.offset(op, view.stride_outer, view.stride_inner) : 0);
}

// 2^exponent of a logit x is exp((x - reference) / T). The difference comes first, so that a common offset of the logits costs no
// digits; __fmul_rn, here and below, keeps the product from being fused into a later addition, or the difference of two equal
// exponents or probabilities would be its rounding error and not 0.
struct Exponent {
  float scale, reference;

  // A reference of -inf (nothing but -inf so far) counts as 0: then such logits get 2^-inf = 0 and not NaN.
  __device__ Exponent(float scale, float reference) : scale(scale), reference(reference == -INFINITY ? 0.f : reference) {}
  __device__ float operator()(float x) const { return __fmul_rn(x - reference, scale); }
};

__device__ float temperature(const KdLoss& op, int64_t row) {
  float t = op.row_temperature == nullptr ? op.temperature : op.row_temperature[row];
  return t > 0.f ? t : kNaN;
}

__device__ bool has_label(const KdLoss& op, int64_t row) {
  return op.labels != nullptr && op.labels[row] != op.ignore_index;
}

// The online sums of one row over the classes seen so far, relative to a reference logit of each side.
template <Kind kind>
struct RowSums {
  const bool hard;                     // with labels: z_hard is wanted
  const float scale;                   // log2(e) / T
  const float slack;                   // how far above its reference a logit may lie: 2^exponent never overflows, nor at T = 1
  float reference_s = -INFINITY, reference_t = -INFINITY;
  Exponent of_s, of_t;
  float z_s = 0.f, z_t = 0.f;          // sum 2^exponent
  float cross = 0.f;                   // sum of weight * difference of exponents
  float z_hard = 0.f;                  // z_s at T = 1

  __device__ RowSums(float temperature, bool hard)
      : hard(hard), scale(kLog2E / temperature), slack(kSlack / (hard ? fmaxf(scale, kLog2E) : scale)),
        of_s(scale, -INFINITY), of_t(scale, -INFINITY) {}

  // Expresses the sums by new references. A sum that underflows takes its cross term along, be that +inf.
  __device__ void rebase(float new_s, float new_t) {
    const Exponent then_s(scale, new_s), then_t(scale, new_t);
    const float moved_s = then_s(of_s.reference), moved_t = then_t(of_t.reference);
    const float moved_hard = Exponent(kLog2E, new_s)(of_s.reference);
    const float factor_s = reference_s == -INFINITY ? 0.f : exp2_flush(moved_s);
    const float factor_t = reference_t == -INFINITY ? 0.f : exp2_flush(moved_t);
    if constexpr (kind == kKl) cross = fmaf(z_t, moved_t - moved_s, cross);
    if constexpr (kind == kCe) cross = fmaf(z_t, -moved_s, cross);
    if constexpr (kind == kReverseKl) cross = fmaf(z_s, moved_s - moved_t, cross);
    z_s *= factor_s;
    z_t *= factor_t;
    z_hard *= reference_s == -INFINITY ? 0.f : exp2_flush(moved_hard);
    const float weight = kind == kReverseKl ? z_s : z_t;
    cross = weight == 0.f ? 0.f : cross * (kind == kReverseKl ? factor_s : factor_t);
    reference_s = new_s, reference_t = new_t;
    of_s = then_s, of_t = then_t;
  }

  __device__ void add(const float (&s)[kChunk], const float (&t)[kChunk]) {
    float top_s = s[0], top_t = t[0];
#pragma unroll
    for (int k = 1; k < kChunk; ++k) {
      top_s = fmaxf(top_s, s[k]);
      top_t = fmaxf(top_t, t[k]);
    }
    if (top_s > reference_s + slack || top_t > reference_t + slack) {
      rebase(fmaxf(top_s, reference_s), fmaxf(top_t, reference_t));
    }
#pragma unroll
    for (int k = 0; k < kChunk; ++k) {
      const float a_s = of_s(s[k]), a_t = of_t(t[k]);
      const float w_s = exp2_flush(a_s), w_t = exp2_flush(a_t);
      z_s += w_s;
      z_t += w_t;
      // A weight of 0 makes the term 0, also where the other side is -inf.
      if constexpr (kind == kKl) cross = w_t != 0.f ? fmaf(w_t, a_t - a_s, cross) : cross;
      if constexpr (kind == kCe) cross = w_t != 0.f ? fmaf(w_t, -a_s, cross) : cross;
      if constexpr (kind == kReverseKl) cross = w_s != 0.f ? fmaf(w_s, a_s - a_t, cross) : cross;
    }
    if (hard) {
      const Exponent of_hard(kLog2E, reference_s);
#pragma unroll
      for (int k = 0; k < kChunk; ++k) z_hard += exp2_flush(of_hard(s[k]));
    }
  }

  // Merges the sums of all lanes of the row; every lane gets them.
  __device__ void merge(int lanes) {
    float references[] = {reference_s, reference_t};
    reduce<Max>(references, lanes);
    rebase(references[0], references[1]);
    float sums[] = {z_s, z_t, cross, z_hard};
    reduce<Sum>(sums, lanes);
    z_s = sums[0], z_t = sums[1], cross = sums[2], z_hard = sums[3];
  }

  // The divergence in nats, for the kinds that one sweep computes.
  __device__ float divergence() const {
    const float log_z_s = log2f(z_s), log_z_t = log2f(z_t);
    if constexpr (kind == kCe) return kLn2 * (mean_cross() + log_z_s);
    return kLn2 * (mean_cross() - (kind == kKl ? log_z_t - log_z_s : log_z_s - log_z_t));
  }

  __device__ float mean_cross() const { return cross / (kind == kReverseKl ? z_s : z_t); }
};

// The pair of softmaxes of one row once their normalisers are known.
struct Softmaxes {
  Exponent of_s, of_t;
  float inverse_s, inverse_t, log_z_s, log_z_t;

  __device__ Softmaxes(float scale, float reference_s, float inverse_s, float reference_t, float inverse_t)
      : of_s(scale, reference_s), of_t(scale, reference_t), inverse_s(inverse_s), inverse_t(inverse_t),
        log_z_s(-log2f(inverse_s)), log_z_t(-log2f(inverse_t)) {}

  __device__ float p_s(float x) const { return __fmul_rn(exp2_flush(of_s(x)), inverse_s); }
  __device__ float p_t(float x) const { return __fmul_rn(exp2_flush(of_t(x)), inverse_t); }
  __device__ float log2_s(float x) const { return alive(of_s(x) - log_z_s); }
  __device__ float log2_t(float x) const { return alive(of_t(x) - log_z_t); }
  __device__ static float alive(float log) { return log < kDead ? kDead : log; }  // keeps NaN
};

// With beta 0 or 1 jsd compares a softmax with itself: exactly 0, which Mixture would miss by its rounding.
__device__ bool trivial(Kind kind, float beta) { return kind == kJsd && (beta == 0.f || beta == 1.f); }

// One class of jsd. m = beta p_t + (1 - beta) p_s is never formed: its log comes from the larger of the two log-probabilities.
struct Mixture {
  float p_s, p_t;
  float student, teacher;  // log2 p_s - log2 m, log2 p_t - log2 m

  __device__ Mixture(float log_s, float log_t, float beta) {
    const float gap = -fabsf(log_s - log_t);
    const float ratio = exp2_flush(gap);  // of the smaller to the larger probability
    const float p_high = exp2_flush(fmaxf(log_s, log_t)), p_low = p_high * ratio;
    const bool student_high = log_s > log_t;
    // The bound matters for beta 0 and 1 only, where the term that it keeps finite has weight 0.
    const float mix = student_high ? fmaf(beta, ratio, 1.f - beta) : fmaf(1.f - beta, ratio, beta);
    const float high = -log2f(fmaxf(mix, 0x1p-126f)), low = gap + high;
    p_s = student_high ? p_high : p_low;
    p_t = student_high ? p_low : p_high;
    student = student_high ? high : low;
    teacher = student_high ? low : high;
  }
};

// Calls visit(s, t, first class) for every chunk that is this lane's.
template <class S, class T, class Visit>
__device__ void sweep(const Row<S>& student, const Row<T>& teacher, int pad, const Place& at, Visit visit) {
  constexpr int kUnroll = sizeof(S) + sizeof(T) > 4 ? 1 : 2;  // 48 or 64 bytes in flight per thread
  const int step = kChunk * at.lanes;
  for (int first = at.lane * kChunk - pad; first < student.classes; first += kUnroll * step) {
    Chunk<S> raw_s[kUnroll];
    Chunk<T> raw_t[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {  // all loads leave before the first is used
      raw_s[u] = student.load(first + u * step);
      raw_t[u] = teacher.load(first + u * step);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      float s[kChunk], t[kChunk];
#pragma unroll
      for (int k = 0; k < kChunk; ++k) s[k] = to_float(raw_s[u].at[k]), t[k] = to_float(raw_t[u].at[k]);
      visit(s, t, first + u * step);
    }
  }
}

// What jsd and tv need a second sweep for: the divergence in nats and, for backward, KL(p_s|m) in octaves or sum p_s g.
template <Kind kind, class S, class T>
__device__ void second_sweep(const Row<S>& student, const Row<T>& teacher, int pad, const Place& at, const Softmaxes& p,
                             float beta, float& aux, float& divergence) {
  float of_s = 0.f, of_t = 0.f;
  if (at.real) {
    sweep(student, teacher, pad, at, [&](const float(&s)[kChunk], const float(&t)[kChunk], int) {
#pragma unroll
      for (int k = 0; k < kChunk; ++k) {
        if constexpr (kind == kJsd) {
          const Mixture m(p.log2_s(s[k]), p.log2_t(t[k]), beta);
          of_s = fmaf(m.p_s, m.student, of_s);
          of_t = fmaf(m.p_t, m.teacher, of_t);
        } else {
          const float p_s = p.p_s(s[k]), p_t = p.p_t(t[k]);
          of_s += p_s > p_t ? p_s : p_s < p_t ? -p_s : 0.f;
          of_t += fabsf(p_s - p_t);
        }
      }
    });
  }
  float sums[] = {of_s, of_t};
  reduce<Sum>(sums, at.lanes);
  if constexpr (kind == kJsd) {
    aux = sums[0];
    divergence = trivial(kind, beta) ? 0.f * aux : kLn2 * (beta * sums[1] + (1.f - beta) * aux);
  } else {
    divergence = 0.5f * sums[1];
    aux = 0.5f * sums[0] + 0.f * divergence;  // NaN where a probability is, which comparisons pass over
  }
}

// The factors of the two terms where the reduction needs no count.
__device__ float soft_weight(const KdLoss& op) { return op.labels == nullptr ? 1.f : op.alpha; }
__device__ float hard_weight(const KdLoss& op) { return op.labels == nullptr ? 0.f : 1.f - op.alpha; }

template <Kind kind, class S, class T>
__global__ void __launch_bounds__(kMaxThreads, 2) forward(KdLoss op, int lanes) {
  const Place at(op, lanes);
  const S* data_s = row_data<S>(op.student, op, at);
  const T* data_t = row_data<T>(op.teacher, op, at);
  const int pad = op.student.stride_class == 1 ? grid_pad(data_s) : 0;
  const Row<S> student(data_s, op.student.stride_class, static_cast<int>(op.classes), pad);
  const Row<T> teacher(data_t, op.teacher.stride_class, static_cast<int>(op.classes), pad);

  const float t = at.real ? temperature(op, at.row) : 1.f;
  const bool hard = op.labels != nullptr;
  RowSums<kind> sums(t, hard);
  if (at.real) {
    sweep(student, teacher, pad, at, [&](const float(&s)[kChunk], const float(&t)[kChunk], int) { sums.add(s, t); });
  }
  sums.merge(lanes);

  float divergence, aux;
  if constexpr (kOneSweep<kind>) {
    divergence = sums.divergence();
    aux = sums.mean_cross();
  } else {
    const Softmaxes p(sums.scale, sums.reference_s, 1.f / sums.z_s, sums.reference_t, 1.f / sums.z_t);
    second_sweep<kind>(student, teacher, pad, at, p, op.beta, aux, divergence);
  }
  if (!at.exists || at.lane != 0) return;

  float stats[kKdStats] = {};
  if (at.real) {
    stats[kMaxS] = sums.reference_s;
    stats[kInvZS] = 1.f / sums.z_s;
    stats[kMaxT] = sums.reference_t;
    stats[kInvZT] = 1.f / sums.z_t;
    stats[kAux] = aux;
    stats[kSoftLoss] = divergence * (op.scale_t2 ? t * t : 1.f);
  }
  if (at.real && has_label(op, at.row)) {
    const int64_t label = op.labels[at.row];
    const bool valid = label >= 0 && label < op.classes;
    const float x = valid ? to_float(data_s[label * op.student.stride_class]) : kNaN;
    stats[kInvZHard] = valid ? 1.f / sums.z_hard : kNaN;
    stats[kHardLoss] = kLn2 * (log2f(sums.z_hard) - Exponent(kLog2E, sums.reference_s)(x));
  }
  float* out = op.stats + at.row * kKdStats;
#pragma unroll
  for (int i = 0; i < kKdStats; ++i) out[i] = stats[i];
  if (op.reduction != kNone) return;
  op.loss[at.row] = soft_weight(op) * stats[kSoftLoss] + (hard ? hard_weight(op) * stats[kHardLoss] : 0.f);
}

// What a scalar reduction adds up over rows.
struct Total {
  double soft, hard;
  int64_t real, labelled;
};

__device__ Total row_total(const KdLoss& op, int64_t row) {
  const bool real = op.mask == nullptr || op.mask[row];
  const float* stats = op.stats + row * kKdStats;
  return {stats[kSoftLoss], stats[kHardLoss], real, real && has_label(op, row)};
}

// The sum of item(first), ..., item(end - 1), for every thread of the block.
template <class Item>
__device__ Total block_total(int64_t first, int64_t end, Item item) {
  double losses[2] = {};
  long long counts[2] = {};
  for (int64_t i = first + threadIdx.x; i < end; i += blockDim.x) {
    const Total one = item(i);
    losses[0] += one.soft, losses[1] += one.hard;
    counts[0] += one.real, counts[1] += one.labelled;
  }
  reduce<Sum>(losses, blockDim.x);
  reduce<Sum>(counts, blockDim.x);
  return {losses[0], losses[1], counts[0], counts[1]};
}

// Totals of kRowsPerSum rows per block, for finish.
__global__ void __launch_bounds__(kSumThreads) sum_rows(KdLoss op, Total* partial) {
  const int64_t rows = op.outer * op.inner, first = int64_t(blockIdx.x) * kRowsPerSum;
  const int64_t end = first + kRowsPerSum < rows ? first + kRowsPerSum : rows;
  const Total total = block_total(first, end, [&](int64_t row) { return row_total(op, row); });
  if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

// The scalar loss from the partial totals, or from the rows themselves where there are none. Backward needs the factor of each
// term too, and takes it from where row 0's two losses stood: they have been added by then.
__global__ void __launch_bounds__(kSumThreads) finish(KdLoss op, const Total* partial, int partials) {
  const int64_t rows = op.outer * op.inner;
  const Total total = partial != nullptr
                          ? block_total(0, partials, [&](int64_t i) { return partial[i]; })
                          : block_total(0, rows, [&](int64_t row) { return row_total(op, row); });
  if (threadIdx.x != 0) return;
  double soft = soft_weight(op), hard = hard_weight(op);
  if (op.reduction != kSum) {
    const double real = total.real > 0 ? total.real : 1, labelled = total.labelled > 0 ? total.labelled : 1;
    soft /= op.reduction == kMean ? real * op.classes : real;
    hard /= labelled;
  }
  *op.loss = static_cast<float>(soft * total.soft + (op.labels != nullptr ? hard * total.hard : 0.));
  if (rows > 0) {
    op.stats[kSoftLoss] = static_cast<float>(soft);
    op.stats[kHardLoss] = static_cast<float>(hard);
  }
}

// d loss / d student of one class, without the factors that the row's classes share.
template <Kind kind>
__device__ float soft_gradient(const Softmaxes& p, float s, float t, float aux, float beta) {
  if constexpr (kind == kKl || kind == kCe) return p.p_s(s) - p.p_t(t);
  if constexpr (kind == kReverseKl) {
    const float p_s = p.p_s(s);
    return p_s == 0.f ? 0.f : p_s * (kLn2 * (p.of_s(s) - p.of_t(t) - aux));
  }
  if constexpr (kind == kJsd) {
    const Mixture m(p.log2_s(s), p.log2_t(t), beta);
    return (1.f - beta) * m.p_s * (kLn2 * (m.student - aux));
  }
  const float p_s = p.p_s(s), p_t = p.p_t(t);
  return p_s * ((p_s > p_t ? 0.5f : p_s < p_t ? -0.5f : 0.f) - aux);
}

template <Kind kind, class S, class T>
__global__ void __launch_bounds__(kMaxThreads, 2) backward(KdLoss op, int lanes) {
  const Place at(op, lanes);
  if (!at.exists) return;
  const int classes = static_cast<int>(op.classes);
  S* out = static_cast<S*>(op.grad_student) + at.row * op.classes;
  const int pad = grid_pad(out);
  const bool vector = on_grid(out, pad);
  if (!at.real) {
    const float zero[kChunk] = {};
    for (int first = at.lane * kChunk - pad; first < classes; first += kChunk * lanes) store(out, classes, vector, first, zero);
    return;
  }

  const float* stats = op.stats + at.row * kKdStats;
  const float t = temperature(op, at.row);
  const bool counted = op.reduction == kMean || op.reduction == kBatchMean;
  const float grad =
      op.grad_loss[op.reduction == kNone ? at.offset(op, op.grad_stride_outer, op.grad_stride_inner) : 0];
  float soft = grad * (counted ? op.stats[kSoftLoss] : soft_weight(op)) * (op.scale_t2 ? t : 1.f / t);
  if (trivial(kind, op.beta)) soft = 0.f;
  const bool labelled = has_label(op, at.row);
  const float hard = labelled ? grad * (counted ? op.stats[kHardLoss] : hard_weight(op)) : 0.f;
  const int label = labelled ? static_cast<int>(op.labels[at.row]) : -1;
  const float inverse_hard = stats[kInvZHard], aux = stats[kAux];
  const Exponent of_hard(kLog2E, stats[kMaxS]);
  const Softmaxes p(kLog2E / t, stats[kMaxS], stats[kInvZS], stats[kMaxT], stats[kInvZT]);

  const Row<S> student(row_data<S>(op.student, op, at), op.student.stride_class, classes, pad);
  const Row<T> teacher(row_data<T>(op.teacher, op, at), op.teacher.stride_class, classes, pad);
  sweep(student, teacher, pad, at, [&](const float(&s)[kChunk], const float(&t)[kChunk], int first) {
    float gradient[kChunk];
#pragma unroll
    for (int k = 0; k < kChunk; ++k) {
      gradient[k] = soft * soft_gradient<kind>(p, s[k], t[k], aux, op.beta);
      if (labelled) gradient[k] += hard * (exp2_flush(of_hard(s[k])) * inverse_hard - (first + k == label ? 1.f : 0.f));
    }
    store(out, classes, vector, first, gradient);
  });
}

// How a call is cut up: lanes per row, threads per block, blocks.
struct Shape {
  int lanes, threads;
  int64_t blocks;
};

// Short rows share a warp, long ones get a block. Four blocks of 256 on an SM keep 64 KB of loads in flight, where 25 KB hide the
// latency of memory; with too few rows for that, a block has 512.
Shape shape(const KdLoss& op) {
  const int64_t rows = op.outer * op.inner;
  Shape s;
  s.lanes = op.classes <= 32 ? 1 : op.classes <= 128 ? 8 : op.classes <= 2048 ? kWarp : rows >= 512 ? 256 : kMaxThreads;
  s.threads = s.lanes > kWarp ? s.lanes : 128;
  s.blocks = (rows * s.lanes + s.threads - 1) / s.threads;
  return s;
}

template <class Use>
int with_type(DType type, Use use) {
  switch (type) {
    case DType::kF32: return use(float{});
    case DType::kBF16: return use(__nv_bfloat16{});
    case DType::kF16: return use(__half{});
  }
  return cudaErrorInvalidValue;
}

template <class Use>
int with_kind(Kind kind, Use use) {
  switch (kind) {
    case kKl: return use(std::integral_constant<Kind, kKl>{});
    case kCe: return use(std::integral_constant<Kind, kCe>{});
    case kReverseKl: return use(std::integral_constant<Kind, kReverseKl>{});
    case kJsd: return use(std::integral_constant<Kind, kJsd>{});
    case kTv: return use(std::integral_constant<Kind, kTv>{});
  }
  return cudaErrorInvalidValue;
}

// use(kind, student element, teacher element) with the types of the call.
template <class Use>
int with_types(const KdLoss& op, Use use) {
  return with_kind(op.kind, [&](auto kind) {
    return with_type(op.student.dtype, [&](auto s) {
      return with_type(op.teacher.dtype, [&](auto t) { return use(kind, s, t); });
    });
  });
}

bool fits(const KdLoss& op) {
  constexpr int64_t kMaxInt = std::numeric_limits<int>::max();
  // The last chunks of a sweep may begin this far behind the row.
  return op.classes <= kMaxInt - 2 * kChunk * (kMaxThreads + 1) && shape(op).blocks <= kMaxInt;
}

int64_t partial_sums(const KdLoss& op) {
  const int64_t rows = op.outer * op.inner;
  return op.reduction == kNone || rows <= kRowsPerSum ? 0 : (rows + kRowsPerSum - 1) / kRowsPerSum;
}

}  // namespace

int64_t kd_loss_workspace_bytes(const KdLoss& op) { return partial_sums(op) * static_cast<int64_t>(sizeof(Total)); }

int kd_loss_forward(const KdLoss& op, void* workspace, void* stream) {
  if (!fits(op)) return cudaErrorInvalidValue;
  const Shape s = shape(op);
  if (s.blocks > 0) {
    const int status = with_types(op, [&](auto kind, auto student, auto teacher) {
      return launch(forward<kind, decltype(student), decltype(teacher)>, s.blocks, s.threads, stream, op, s.lanes);
    });
    if (status != cudaSuccess) return status;
  }
  if (op.reduction == kNone) return cudaSuccess;
  Total* partial = nullptr;
  const int64_t partials = partial_sums(op);
  if (partials > 0) {
    partial = static_cast<Total*>(workspace);
    const int status = launch(sum_rows, partials, kSumThreads, stream, op, partial);
    if (status != cudaSuccess) return status;
  }
  return launch(finish, 1, kSumThreads, stream, op, static_cast<const Total*>(partial), static_cast<int>(partials));
}

int kd_loss_backward(const KdLoss& op, void* stream) {
  if (!fits(op)) return cudaErrorInvalidValue;
  const Shape s = shape(op);
  if (s.blocks == 0) return cudaSuccess;
  return with_types(op, [&](auto kind, auto student, auto teacher) {
    return launch(backward<kind, decltype(student), decltype(teacher)>, s.blocks, s.threads, stream, op, s.lanes);
  });
}

}  // namespace kd::cuda
