// hidden_mse with a projection: y = S W^T + b of the real tokens, the loss against T as without one, and for an upstream of 1
//
//   G = d(loss)/dy,  dS = G W,  dW = G^T S,  db = sum of G's rows
//
// Floor: three products of 2 rows d_s d_t operations; everything else should cost nothing beside them. Blocks of rows make their y,
// turn it into G and multiply it by W while it is in the L2 cache; y and y - T are never stored whole. dW needs all rows, so it comes
// second, in blocks of its own rows: no partial sums, and the order of additions depends on nothing but the shape.
//
// All operands are packed for gemm.inl. B is W^T or W in panels of kPanel columns, made once for all layers that share a weight, and S in
// panels for dW. A is S or G by rows, and for dW G in groups of kRowPad columns, so that the numbers a tile broadcasts lie together.
// Products go in steps of kDepth, whose B (32 KiB with the widest vectors) stays in the L1 cache while all rows of a block use it; the
// next step's is asked for meanwhile.

constexpr int64_t kDepth = 128;

struct ProjectionSizes {
  int64_t panels_s, panels_t, groups_t;  // panels of d_s and d_t columns; groups of kRowPad columns of d_t
  int64_t width_s, width_t;              // of a row in scratch: an odd number of cache lines, so that rows spread over cache sets
};

inline ProjectionSizes projection_sizes(const HiddenProjection& op) {
  return {round_up(op.d_s, kPanel) / kPanel, round_up(op.d_t, kPanel) / kPanel, round_up(op.d_t, kRowPad) / kRowPad,
          round_up(op.d_s, 32) + 16, round_up(op.d_t, 32) + 16};
}

// A weight as B, for all layers that share it, and the bias.
struct PackedWeight {
  float* weight_t;  // W^T: panels_t x [d_s, kPanel]
  float* bias;      // [d_t], 0 where there is none
  float* weight;    // W: panels_s x [d_t, kPanel]; null without gradients
};

// What the rows of a layer leave for the gradient of its weight.
struct PackedRows {
  float* states;     // S of the real tokens: panels_s x [rows, kPanel]
  float* gradients;  // G of the real tokens: groups_t x [rows, kRowPad]
};

ProjectionFloats projection_floats(const HiddenProjection& op) {
  const ProjectionSizes s = projection_sizes(op);
  const bool grad = op.grad_student;
  const int64_t weight = s.panels_t * op.d_s * kPanel + round_up(op.d_t, 16) + (grad ? s.panels_s * op.d_t * kPanel : 0);
  const int64_t rows = grad ? op.rows * (s.panels_s * kPanel + s.groups_t * kRowPad) : 0;
  // A block of S, of dS or of dW, a block of y, and one row of either side.
  return {weight, rows, (kProjectionBlock + 1) * (s.width_s + s.width_t)};
}

inline PackedWeight packed_weight(const HiddenProjection& op) {
  const ProjectionSizes s = projection_sizes(op);
  float *bias = op.packed_weight + s.panels_t * op.d_s * kPanel, *weight = bias + round_up(op.d_t, 16);
  return {op.packed_weight, bias, op.grad_student ? weight : nullptr};
}

inline PackedRows packed_rows(const HiddenProjection& op) {
  return {op.packed_rows, op.packed_rows + projection_sizes(op).panels_s * op.rows * kPanel};
}

inline void zero(float* x, int64_t n) { __builtin_memset(x, 0, n * sizeof(float)); }

// Rows [first, first + n) of a matrix of `rows` rows, `stride` apart, into its panels [rows, width]; what a panel has more is 0. One panel
// after the other: panels lie so far apart, often a multiple of 4 KiB, that a row's parts would drive each other out of the cache.
inline void store_in_panels(const float* x, int64_t stride, int64_t columns, int64_t rows, int64_t first, int64_t n, int64_t width,
                            float* panels) {
  for (int64_t begin = 0; begin < columns; begin += width, panels += rows * width) {
    const int64_t filled = columns - begin < width ? columns - begin : width;
    for (int64_t r = 0; r < n; ++r) {
      float* out = panels + (first + r) * width;
      const float* in = x + r * stride + begin;
      for_vectors(filled, [&](int64_t i, int64_t lanes) { store_up_to(out + i, load_up_to(in + i, lanes, 0), lanes); });
      for (int64_t i = filled; i < width; ++i) out[i] = 0;
    }
  }
}

void projection_pack(const HiddenProjection& op, int64_t item, float* scratch) {
  const PackedWeight w = packed_weight(op);
  const int64_t first = item * kProjectionBlock, last = first + kProjectionBlock < op.d_t ? first + kProjectionBlock : op.d_t;
  for (int64_t t = first; t < last; ++t) {
    const float* row = as_floats(op.weight, op.weight_dtype, t * op.weight_stride_row, op.weight_stride_column, op.d_s, scratch);
    float* column = w.weight_t + t / kPanel * op.d_s * kPanel + t % kPanel;
    for (int64_t k = 0; k < op.d_s; ++k) column[k * kPanel] = row[k];
    if (w.weight) store_in_panels(row, 0, op.d_s, op.d_t, t, 1, kPanel, w.weight);
    w.bias[t] = 0;
    if (op.bias) w.bias[t] = *as_floats(op.bias, op.bias_dtype, t * op.bias_stride, 1, 1, scratch);
  }
  for (int64_t t = last; last == op.d_t && t < round_up(op.d_t, kPanel); ++t)
    for (int64_t k = 0; k < op.d_s; ++k) w.weight_t[(t / kPanel * op.d_s + k) * kPanel + t % kPanel] = 0;
}

// Asks the next step's operands into the L2 cache while a step runs, a little with each k: B and, for dW, A come from farther away, and
// asked for all at once they would be waited for.
struct NextStep {
  const float* b;  // as deep as this one, shared out over `rows` rows of A
  const float* a;  // a group of kRowPad columns; b where A needs no asking
  int64_t rows, depth;

  void operator()(int64_t first, int64_t tile, int64_t k) const {
    __builtin_prefetch(b + first * depth * kPanel / rows + k * (kPanel * tile / rows), 0, 2);
    __builtin_prefetch(a + first * depth + k * tile, 0, 2);
  }
};

// C = A B for `rows` rows (whole tiles) with B in packed panels [depth, kPanel], in steps of kDepth. A is in rows, a_row apart, or where
// kGroups in groups [depth, kRowPad], one for each kRowPad rows of C. Columns are rounded up to whole vectors.
template <bool kGroups>
inline void projection_product(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t a_row, const float* b, float* c,
                               int64_t ldc) {
  for (int64_t k = 0; k < depth; k += kDepth) {
    const int64_t step = depth - k < kDepth ? depth - k : kDepth;
    for (int64_t n = 0; n < columns; n += kPanel) {
      const int64_t left = round_up(columns - n, W), across = left < kPanel ? left : kPanel;
      const bool last = n + kPanel >= columns;
      const float *part = b + n * depth + k * kPanel, *next = last ? b + (k + step) * kPanel : part + depth * kPanel;
      const auto product = k == 0 ? gemm_ahead<false, float, NextStep> : gemm_ahead<true, float, NextStep>;
      if (!kGroups) product(rows, across, step, a + k, a_row, 1, part, kPanel, 0, c + n, ldc, {next, next, rows, step});
      for (int64_t m = 0; kGroups && m < rows; m += kRowPad) {
        const float *group = a + m * depth, *own = group + k * kRowPad, *share = next + m * step * kPanel / rows;
        product(kRowPad, across, step, own, 1, kRowPad, part, kPanel, 0, c + m * ldc + n, ldc,
                {share, last ? own + step * kRowPad : share, rows, step});
      }
    }
  }
}

// One row y of the projection without its bias -> its sum of squares, and its row of G over y.
inline double projection_residual(const HiddenProjection& op, const float* bias, const float* t, float* y, float* row_t) {
  const vf coef = set1(op.grad_weight);
  if (op.normalize == kNoNormalize)
    return hidden_sum(op.d_t, [&](int64_t i, int64_t lanes) {
      const vf e = load_up_to(y + i, lanes, 0) + load_up_to(bias + i, lanes, 0) - load_up_to(t + i, lanes, 0);
      store_up_to(y + i, coef * e, lanes);
      return e * e;
    });
  for_vectors(op.d_t, [&](int64_t i, int64_t lanes) {
    store_up_to(y + i, load_up_to(y + i, lanes, 0) + load_up_to(bias + i, lanes, 0), lanes);
  });
  const HiddenScale scale = hidden_normalize(op.normalize, y, op.d_t, y);
  hidden_normalize(op.normalize, t, op.d_t, row_t);
  const double squares = hidden_squares(y, row_t, op.d_t);
  if (op.grad_student) hidden_gradient(op.normalize, scale, y, row_t, op.d_t, op.grad_weight, y);
  return squares;
}

void projection_rows(const HiddenProjection& op, int64_t item, float* scratch) {
  const ProjectionSizes size = projection_sizes(op);
  const bool grad = op.grad_student;
  const PackedWeight w = packed_weight(op);
  float *s = scratch, *y = s + kProjectionBlock * size.width_s, *row_s = y + kProjectionBlock * size.width_t;
  float* row_t = row_s + size.width_s;
  const int64_t first = item * kProjectionBlock, left = op.rows - first, rows = left < kProjectionBlock ? left : kProjectionBlock;

  for (int64_t r = 0; r < rows; ++r) {
    const float* row = hidden_row(op.student, op.tokens, op.real[first + r], op.d_s, row_s);
    from_floats(row, op.d_s, s, DType::kF32, r * size.width_s);
  }
  if (grad) store_in_panels(s, size.width_s, op.d_s, op.rows, first, rows, kPanel, packed_rows(op).states);
  for (int64_t r = rows; r < round_up(rows, kRowPad); ++r) zero(s + r * size.width_s, op.d_s);
  projection_product<false>(round_up(rows, kRowPad), op.d_t, op.d_s, s, size.width_s, w.weight_t, y, size.width_t);

  double total = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const float* t = hidden_row(op.teacher, op.tokens, op.real[first + r], op.d_t, row_t);
    total += projection_residual(op, w.bias, t, y + r * size.width_t, row_t);
  }
  op.partial[item] = total;
  if (!grad) return;

  store_in_panels(y, size.width_t, op.d_t, op.rows, first, rows, kRowPad, packed_rows(op).gradients);
  projection_product<false>(round_up(rows, kRowPad), op.d_s, op.d_t, y, size.width_t, w.weight, s, size.width_s);
  // An item writes the gradient from its first real token (item 0: from the first token) to the next item's.
  int64_t token = first == 0 ? 0 : op.real[first];
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t own = op.real[first + r];
    zero(op.grad_student + token * op.d_s, (own - token) * op.d_s);
    from_floats(s + r * size.width_s, op.d_s, op.grad_student, DType::kF32, own * op.d_s);
    token = own + 1;
  }
  const int64_t end = left > kProjectionBlock ? op.real[first + rows] : op.batch * op.tokens;
  zero(op.grad_student + token * op.d_s, (end - token) * op.d_s);
}

// x to out, or added to it.
inline void put(const float* x, int64_t n, bool accumulate, float* out) {
  for_vectors(n, [&](int64_t i, int64_t lanes) {
    const vf v = load_up_to(x + i, lanes, 0);
    store_up_to(out + i, accumulate ? load_up_to(out + i, lanes, 0) + v : v, lanes);
  });
}

void projection_weight(const HiddenProjection& op, int64_t item, float* scratch) {
  const ProjectionSizes size = projection_sizes(op);
  const PackedRows packed = packed_rows(op);
  const int64_t begin = item * kProjectionBlock;
  const int64_t end = begin + kProjectionBlock < op.d_t ? begin + kProjectionBlock : op.d_t;
  float* c = scratch;
  if (op.rows == 0) zero(c, kProjectionBlock * size.width_s);
  projection_product<true>(round_up(end - begin, kRowPad), op.d_s, op.rows, packed.gradients + begin * op.rows, 0, packed.states, c,
                           size.width_s);
  for (int64_t t = begin; t < end; ++t) put(c + (t - begin) * size.width_s, op.d_s, op.accumulate, op.grad_matrix + t * op.d_s);
  if (!op.grad_bias) return;
  for (int64_t t = begin; t < end; t += kRowPad) {
    const float* group = packed.gradients + t * op.rows;
    double sums[kRowPad] = {};
    for (int64_t r = 0; r < op.rows; ++r)
      for (int64_t i = 0; i < kRowPad; ++i) sums[i] += group[r * kRowPad + i];
    float rounded[kRowPad];
    for (int64_t i = 0; i < kRowPad; ++i) rounded[i] = static_cast<float>(sums[i]);
    put(rounded, end - t < kRowPad ? end - t : kRowPad, op.accumulate, op.grad_bias + t);
  }
}
