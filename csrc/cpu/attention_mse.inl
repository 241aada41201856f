// attention_mse on scores, sum over real (i, j) of (a q_s k_s^T - b q_t k_t^T)^2, from Gram matrices: no score is ever made.
//
//   Q = [a Q_s, -b Q_t], K = [K_s, K_t] (n x D, D = d_s + d_t), so that the difference of the scores is Q K^T
//   loss = <Q^T Q, K^T K>,  dQ_s = 2 a w [Q (K^T K)]_s,  dK_s = 2 w [K (Q^T Q)]_s
//
// Floor of one (batch, head): 2 n D^2 operations for two symmetric matrices and 4 n D d_s for the gradients, linear in n. Memory does
// not depend on n: tokens are packed a chunk at a time, forward for the matrices, which it leaves to backward, and backward for the
// gradients.
//
// Where student and teacher are close the loss is a small rest of large terms, r^2 = loss / (|a Q_s K_s^T|^2 + |b Q_t K_t^T|^2) of
// them, and the gradients cancel over n tokens besides: fp32 is lost at r = 0.01. In fp64, at half the speed, loss and gradients are better
// than those of eager fp32 down to r = 1e-6, where inputs differ in their last bits. Below kGramFloor, and for heads of so few
// tokens that it is cheaper, the scores are made in tiles after all; tiles of identical scores differ by exactly 0. A NaN or an
// infinity ends there too.

constexpr double kGramFloor = 1e-13;  // of r^2; rounding is a few 1e-16 of the terms
constexpr int64_t kGramChunk = 8 * kRowPad;

struct GramSizes {
  int64_t d_s, depth;      // the student's head size; both sides'
  int64_t rows, width;     // of a matrix, padded to whole tiles; `width` is also that of a chunk's rows
  int64_t gradient_width;  // d_s padded to whole vectors
};

inline GramSizes gram_sizes(const Attention& op) {
  GramSizes s;
  s.d_s = op.q_s.size;
  s.depth = op.q_s.size + op.q_t.size;
  s.rows = round_up(s.depth, kRowPad);
  s.width = round_up(s.rows, WD);
  s.gradient_width = round_up(s.d_s, WD);
  return s;
}

struct GramBuffers {
  double *gram_q, *gram_k, *chunk, *gradient;
  float* row;
  int32_t* token;
};

// Lays the buffers out in `scratch`; returns the number of floats. With a null scratch it only counts.
inline int64_t gram_buffers(const Attention& op, const GramSizes& s, float* scratch, GramBuffers& b) {
  int64_t used = 0;
  const auto take = [&](int64_t floats) {
    float* p = scratch ? scratch + used : nullptr;
    used += round_up(floats, 16);
    return p;
  };
  const auto take_doubles = [&](int64_t doubles) { return reinterpret_cast<double*>(take(2 * doubles)); };
  b.gram_q = take_doubles(s.rows * s.width);
  b.gram_k = take_doubles(s.rows * s.width);
  b.chunk = take_doubles(kGramChunk * s.width);
  b.gradient = take_doubles(kGramChunk * s.gradient_width);
  b.row = take(s.depth);
  b.token = reinterpret_cast<int32_t*>(take(op.tokens));
  return used;
}

int64_t attention_scores_scratch(const Attention& op) {
  GramBuffers unused;
  const int64_t gram = gram_buffers(op, gram_sizes(op), nullptr, unused), tiles = attention_scratch(op);
  return gram > tiles ? gram : tiles;
}

inline void widen_row(const float* x, int64_t n, double factor, double* out) {
  int64_t k = 0;
  for (; k + WD <= n; k += WD) store(out + k, load_wide(x + k) * factor);
  for (; k < n; ++k) out[k] = x[k] * factor;
}

// Tokens [first, first + rows) of the packed order as rows [a * student, b * teacher] of fp64, up to `padded` rows; the rest is 0.
inline void pack_gram(const HeadsView& student, const HeadsView& teacher, double a, double b, int64_t batch, int64_t head,
                      const int32_t* token, int64_t rows, int64_t padded, const GramSizes& s, double* out, float* scratch) {
  const int64_t begin_s = head_offset(student, batch, head), begin_t = head_offset(teacher, batch, head);
  for (int64_t r = 0; r < padded; ++r, out += s.width) {
    int64_t k = 0;
    if (r < rows) {
      widen_row(head_row(student, begin_s, token[r], scratch), s.d_s, a, out);
      widen_row(head_row(teacher, begin_t, token[r], scratch), s.depth - s.d_s, b, out + s.d_s);
      k = s.depth;
    }
    for (; k < s.width; ++k) out[k] = 0;
  }
}

// gram (+)= x^T x of one chunk, for the tiles that meet the upper triangle.
inline void add_gram(const GramSizes& s, const double* x, int64_t rows, bool add, double* gram) {
  for (int64_t c = 0; c < s.width; c += kPanel / 2) {
    const int64_t columns = s.width - c < kPanel / 2 ? s.width - c : kPanel / 2;
    const int64_t upper = round_up(c + columns, kRowPad), height = upper < s.rows ? upper : s.rows;
    const auto product = add ? gemm<true, double> : gemm<false, double>;
    product(height, columns, rows, x, 1, s.width, x + c, s.width, 0, gram + c, s.width);
  }
}

// Copies the upper triangle to the lower.
inline void mirror(const GramSizes& s, double* gram) {
  for (int64_t i = 0; i < s.depth; ++i)
    for (int64_t j = 0; j < i; ++j) gram[i * s.width + j] = gram[j * s.width + i];
}

// <x, y> over rows and columns [begin, end).
inline double gram_dot(const GramSizes& s, const double* x, const double* y, int64_t begin, int64_t end) {
  double total = 0;
  for (int64_t i = begin; i < end; ++i) {
    vd sums = set1(0.0);
    int64_t j = begin;
    for (; j + WD <= end; j += WD) sums += load(x + i * s.width + j) * load(y + i * s.width + j);
    for (; j < end; ++j) total += x[i * s.width + j] * y[i * s.width + j];
    for (int lane = 0; lane < WD; ++lane) total += sums[lane];
  }
  return total;
}

// factor * (chunk gram)_s, one row per token, to where the gradient of those tokens goes.
inline void write_gram_gradient(const GramSizes& s, const GramBuffers& buf, const double* gram, double factor, int64_t batch, int64_t head,
                                int64_t first, int64_t rows, void* out, const HeadsView& view) {
  gemm<false>(round_up(rows, kRowPad), s.gradient_width, s.depth, buf.chunk, s.width, 1, gram, s.width, kPanel / 2, buf.gradient,
              s.gradient_width);
  const int64_t begin = head_offset(view, batch, head);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t k = 0; k < s.d_s; ++k) buf.row[k] = static_cast<float>(buf.gradient[r * s.gradient_width + k] * factor);
    write_head_row(out, view, begin, buf.token[first + r], buf.row);
  }
}

// What both passes of an item need; chunks of its tokens are packed into buf.chunk.
struct GramItem {
  int64_t batch, head, n;
  GramSizes s;
  GramBuffers buf;
  double *gram_k, *gram_q;  // the item's part of op.gram
};

inline GramItem gram_item(const Attention& op, int64_t item, float* scratch) {
  GramItem g{item / op.heads, item % op.heads, 0, gram_sizes(op), {}, nullptr, nullptr};
  gram_buffers(op, g.s, scratch, g.buf);
  g.n = real_tokens(op, g.batch, g.buf.token);
  if (op.gram) {
    g.gram_k = op.gram + item * g.s.depth * g.s.d_s;
    g.gram_q = g.gram_k + op.batch * op.heads * g.s.depth * g.s.d_s;
  }
  return g;
}

template <typename F>
inline void for_chunks(int64_t n, const F& body) {
  for (int64_t first = 0; first < n; first += kGramChunk) body(first, n - first < kGramChunk ? n - first : kGramChunk);
}

inline void pack_queries(const Attention& op, const GramItem& g, int64_t first, int64_t rows) {
  pack_gram(op.q_s, op.q_t, op.scale_s, -static_cast<double>(op.scale_t), g.batch, g.head, g.buf.token + first, rows,
            round_up(rows, kRowPad), g.s, g.buf.chunk, g.buf.row);
}

inline void pack_keys(const Attention& op, const GramItem& g, int64_t first, int64_t rows) {
  pack_gram(op.k_s, op.k_t, 1, 1, g.batch, g.head, g.buf.token + first, rows, round_up(rows, kRowPad), g.s, g.buf.chunk, g.buf.row);
}

// The student's columns of a matrix: padded, as products want it, to dense, as op.gram holds it, and back.
inline void keep_gram(const GramSizes& s, const double* gram, double* kept) {
  for (int64_t i = 0; i < s.depth; ++i) __builtin_memcpy(kept + i * s.d_s, gram + i * s.width, s.d_s * sizeof(double));
}

inline void restore_gram(const GramSizes& s, const double* kept, double* gram) {
  for (int64_t i = 0; i < s.depth; ++i)
    for (int64_t j = 0; j < s.gradient_width; ++j) gram[i * s.width + j] = j < s.d_s ? kept[i * s.d_s + j] : 0;
}

// The first number of the keys' matrix is a sum of squares; a negative one tells backward to make the scores in tiles as well.
inline void attention_scores_in_tiles(const Attention& all, const GramItem& g, int64_t item, float* scratch) {
  if (all.gram) {
    for (int64_t i = 0; i < g.s.depth * g.s.d_s; ++i) g.gram_k[i] = g.gram_q[i] = 0;
    g.gram_k[0] = -1;
  }
  attention_maps(all, item, scratch);
}

void attention_scores(const Attention& all, int64_t item, float* scratch) {
  const Attention op = sequence_of(all, item / all.heads);
  const GramItem g = gram_item(op, item, scratch);
  const GramSizes& s = g.s;
  if (g.n < s.depth) return attention_scores_in_tiles(all, g, item, scratch);
  for_chunks(g.n, [&](int64_t first, int64_t rows) {
    pack_queries(op, g, first, rows);
    add_gram(s, g.buf.chunk, rows, first > 0, g.buf.gram_q);
    pack_keys(op, g, first, rows);
    add_gram(s, g.buf.chunk, rows, first > 0, g.buf.gram_k);
  });
  mirror(s, g.buf.gram_q);
  mirror(s, g.buf.gram_k);
  const double loss = gram_dot(s, g.buf.gram_q, g.buf.gram_k, 0, s.depth);
  const double terms = gram_dot(s, g.buf.gram_q, g.buf.gram_k, 0, s.d_s) + gram_dot(s, g.buf.gram_q, g.buf.gram_k, s.d_s, s.depth);
  if (!(loss > kGramFloor * terms)) return attention_scores_in_tiles(all, g, item, scratch);
  op.item_loss[item] = loss;
  if (!op.gram) return;
  keep_gram(s, g.buf.gram_k, g.gram_k);
  keep_gram(s, g.buf.gram_q, g.gram_q);
}

void attention_scores_backward(const Attention& all, int64_t item, float* scratch) {
  const Attention op = sequence_of(all, item / all.heads);
  const GramItem g = gram_item(op, item, scratch);
  const GramSizes& s = g.s;
  if (g.gram_k[0] < 0) return attention_maps(all, item, scratch);
  restore_gram(s, g.gram_k, g.buf.gram_k);
  restore_gram(s, g.gram_q, g.buf.gram_q);
  const double twice = 2.0 * op.grad_weight;
  for_chunks(g.n, [&](int64_t first, int64_t rows) {
    pack_queries(op, g, first, rows);
    write_gram_gradient(s, g.buf, g.buf.gram_k, twice * op.scale_s, g.batch, g.head, first, rows, op.grad_q, op.grad_q_view);
    pack_keys(op, g, first, rows);
    write_gram_gradient(s, g.buf, g.buf.gram_q, twice, g.batch, g.head, first, rows, op.grad_k, op.grad_k_view);
  });
  const int64_t begin_q = head_offset(op.grad_q_view, g.batch, g.head), begin_k = head_offset(op.grad_k_view, g.batch, g.head);
  __builtin_memset(g.buf.row, 0, s.d_s * sizeof(float));
  for (int64_t i = 0, r = 0; i < op.tokens; ++i) {
    const bool real = r < g.n && g.buf.token[r] == i;
    r += real;
    if (real) continue;
    write_head_row(op.grad_q, op.grad_q_view, begin_q, i, g.buf.row);
    write_head_row(op.grad_k, op.grad_k_view, begin_k, i, g.buf.row);
  }
}
