// hidden_mse with a projection: y = S W^T + b of the real tokens, the loss against T as without one, and for an upstream of 1
//
//   G = d(loss)/dy,  dS = G W,  dW = G^T S,  db = sum of G's rows
//
// Floor: three products of 2 rows d_s d_t operations; everything else should cost nothing beside them. Blocks of rows make their y,
// turn it into G and multiply it by W while it is in the L2 cache; y and y - T are never stored whole. dW needs all rows, so it comes
// second, in blocks of its own rows: no partial sums, and the order of additions depends on nothing but the shape.
//
// All operands are packed for gemm.inl. B is W^T or W in panels of kPanel columns, made once for all layers that share a weight, and S in
// panels for dW. A is S or G by rows, and for dW G in panels of kRowPad columns, so that the numbers a tile broadcasts lie together.
// Products go in steps of kDepth, whose B (32 KiB with the widest vectors) stays in the L1 cache while all rows of a block use it.

constexpr int64_t kDepth = 128;

struct ProjectionSizes {
  int64_t panels_s, panels_t, groups_t;  // panels of d_s and d_t columns; groups of kRowPad columns of d_t
  int64_t width_s, width_t;              // of a row in scratch: an odd number of cache lines, so that rows spread over cache sets
};

inline ProjectionSizes projection_sizes(const HiddenProjection& op) {
  return {round_up(op.d_s, kPanel) / kPanel, round_up(op.d_t, kPanel) / kPanel, round_up(op.d_t, kRowPad) / kRowPad,
          round_up(op.d_s, 32) + 16, round_up(op.d_t, 32) + 16};
}

// What the kernels of a layer share.
struct ProjectionWorkspace {
  float* weight_t;   // W^T: panels_t x [d_s, kPanel]
  float* bias;       // [d_t], 0 where there is none
  float* weight;     // W: panels_s x [d_t, kPanel]
  float* states;     // S of the real tokens: panels_s x [rows, kPanel]
  float* gradients;  // G of the real tokens: groups_t x [rows, kRowPad]
};

// Lays the workspace out; returns the number of floats. The last three serve gradients only.
inline int64_t projection_layout(const HiddenProjection& op, ProjectionWorkspace& w) {
  const ProjectionSizes s = projection_sizes(op);
  int64_t used = 0;
  const auto take = [&](int64_t floats) {
    float* p = op.workspace ? op.workspace + used : nullptr;
    used += round_up(floats, 16);
    return p;
  };
  w = {};
  w.weight_t = take(s.panels_t * op.d_s * kPanel);
  w.bias = take(op.d_t);
  if (op.grad_student) {
    w.weight = take(s.panels_s * op.d_t * kPanel);
    w.states = take(s.panels_s * op.rows * kPanel);
    w.gradients = take(s.groups_t * op.rows * kRowPad);
  }
  return used;
}

int64_t projection_workspace(const HiddenProjection& op) {
  ProjectionWorkspace unused;
  return projection_layout(op, unused);
}

// A block of S, of dS or of dW, a block of y, and one row of either side.
int64_t projection_scratch(const HiddenProjection& op) {
  const ProjectionSizes s = projection_sizes(op);
  return kProjectionBlock * (s.width_s + s.width_t) + s.width_s + s.width_t;
}

inline void zero(float* x, int64_t n) { __builtin_memset(x, 0, n * sizeof(float)); }

// Row `r` of a matrix of `rows` rows and n columns into panels [rows, width].
inline void store_in_panels(const float* row, int64_t n, int64_t rows, int64_t r, int64_t width, float* panels) {
  float* out = panels + r * width;
  for (int64_t first = 0; first < n; first += width, out += rows * width) {
    const int64_t filled = n - first < width ? n - first : width;
    for_vectors(filled, [&](int64_t i, int64_t lanes) { store_up_to(out + i, load_up_to(row + first + i, lanes, 0), lanes); });
    for (int64_t i = filled; i < width; ++i) out[i] = 0;
  }
}

void projection_pack(const HiddenProjection& op, int64_t item, float* scratch) {
  ProjectionWorkspace w;
  projection_layout(op, w);
  const int64_t first = item * kProjectionBlock, last = first + kProjectionBlock < op.d_t ? first + kProjectionBlock : op.d_t;
  for (int64_t t = first; t < last; ++t) {
    const float* row = as_floats(op.weight, op.weight_dtype, t * op.weight_stride_row, op.weight_stride_column, op.d_s, scratch);
    float* column = w.weight_t + t / kPanel * op.d_s * kPanel + t % kPanel;
    for (int64_t k = 0; k < op.d_s; ++k) column[k * kPanel] = row[k];
    if (w.weight) store_in_panels(row, op.d_s, op.d_t, t, kPanel, w.weight);
    w.bias[t] = 0;
    if (op.bias) w.bias[t] = *as_floats(op.bias, op.bias_dtype, t * op.bias_stride, 1, 1, scratch);
  }
  for (int64_t t = last; last == op.d_t && t < round_up(op.d_t, kPanel); ++t)
    for (int64_t k = 0; k < op.d_s; ++k) w.weight_t[(t / kPanel * op.d_s + k) * kPanel + t % kPanel] = 0;
}

// C = A B with B in packed panels, in steps of kDepth. Columns are rounded up to whole vectors.
inline void projection_product(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t a_row, const float* b, float* c,
                               int64_t ldc) {
  for (int64_t k = 0; k < depth; k += kDepth) {
    const auto product = k == 0 ? gemm<false, float> : gemm<true, float>;
    product(round_up(rows, kRowPad), round_up(columns, W), depth - k < kDepth ? depth - k : kDepth, a + k, a_row, 1, b + k * kPanel,
            kPanel, depth * kPanel, c, ldc);
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
  ProjectionWorkspace w;
  projection_layout(op, w);
  float *s = scratch, *y = s + kProjectionBlock * size.width_s, *row_s = y + kProjectionBlock * size.width_t;
  float* row_t = row_s + size.width_s;
  const int64_t first = item * kProjectionBlock, left = op.rows - first, rows = left < kProjectionBlock ? left : kProjectionBlock;
  const bool grad = op.grad_student;

  for (int64_t r = 0; r < rows; ++r) {
    const float* row = hidden_row(op.student, op.tokens, op.real[first + r], op.d_s, row_s);
    from_floats(row, op.d_s, s, DType::kF32, r * size.width_s);
    if (grad) store_in_panels(row, op.d_s, op.rows, first + r, kPanel, w.states);
  }
  for (int64_t r = rows; r < round_up(rows, kRowPad); ++r) zero(s + r * size.width_s, op.d_s);
  projection_product(rows, op.d_t, op.d_s, s, size.width_s, w.weight_t, y, size.width_t);

  double total = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const float* t = hidden_row(op.teacher, op.tokens, op.real[first + r], op.d_t, row_t);
    total += projection_residual(op, w.bias, t, y + r * size.width_t, row_t);
  }
  op.partial[item] = total;
  if (!grad) return;

  for (int64_t r = 0; r < rows; ++r) store_in_panels(y + r * size.width_t, op.d_t, op.rows, first + r, kRowPad, w.gradients);
  projection_product(rows, op.d_s, op.d_t, y, size.width_t, w.weight, s, size.width_s);
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
  ProjectionWorkspace w;
  projection_layout(op, w);
  const int64_t begin = item * kProjectionBlock, end = begin + kProjectionBlock < op.d_t ? begin + kProjectionBlock : op.d_t;
  const auto group = [&](int64_t t) { return w.gradients + t * op.rows; };  // t: a multiple of kRowPad
  float* c = scratch;
  if (op.rows == 0) zero(c, kProjectionBlock * size.width_s);
  for (int64_t k = 0; k < op.rows; k += kDepth) {
    const int64_t depth = op.rows - k < kDepth ? op.rows - k : kDepth;
    const auto product = k == 0 ? gemm<false, float> : gemm<true, float>;
    for (int64_t p = 0; p < size.panels_s; ++p) {
      const int64_t left = round_up(op.d_s - p * kPanel, W), columns = left < kPanel ? left : kPanel;
      for (int64_t t = begin; t < end; t += kRowPad)
        product(kRowPad, columns, depth, group(t) + k * kRowPad, 1, kRowPad, w.states + (p * op.rows + k) * kPanel, kPanel, 0,
                c + (t - begin) * size.width_s + p * kPanel, size.width_s);
    }
  }
  for (int64_t t = begin; t < end; ++t) put(c + (t - begin) * size.width_s, op.d_s, op.accumulate, op.grad_matrix + t * op.d_s);
  if (!op.grad_bias) return;
  for (int64_t t = begin; t < end; t += kRowPad) {
    double sums[kRowPad] = {};
    for (int64_t r = 0; r < op.rows; ++r)
      for (int64_t i = 0; i < kRowPad; ++i) sums[i] += group(t)[r * kRowPad + i];
    float rounded[kRowPad];
    for (int64_t i = 0; i < kRowPad; ++i) rounded[i] = static_cast<float>(sums[i]);
    put(rounded, end - t < kRowPad ? end - t : kRowPad, op.accumulate, op.grad_bias + t);
  }
}
