// hidden_mse with a projection: y = S W^T + b of the real tokens, the loss against T as without one, and for an upstream of 1
//
//   G = d(loss)/dy,  dS = G W,  dW = G^T S,  db = sum of G's rows
//
// Floor: three products of 2 rows d_s d_t operations; everything else should cost nothing beside them. Blocks of rows make their y,
// turn it into G and multiply it by W while it is in the L2 cache; y and y - T are never stored whole. dW needs all rows, so it comes
// second, in blocks of its own rows: no partial sums, and the order of additions depends on nothing but the shape. The products and
// the layout of their operands are hidden_mse_products.inl's or, on AMX, hidden_mse_products_amx.inl's: numbers that those don't take make
// the loss NaN.

inline void zero(float* x, int64_t n) { __builtin_memset(x, 0, n * sizeof(float)); }

// Floats from row to row in scratch: an odd number of cache lines, so that rows spread over cache sets.
inline int64_t projection_width(int64_t features) { return round_up(features, 32) + 16; }

// Behind the weight's operands, the bias; behind the rows', the sums over each block of G's rows, as doubles.
inline float* projection_bias(const HiddenProjection& op) { return op.packed_weight + weight_operand_floats(op); }
inline double* projection_sums(const HiddenProjection& op) {
  return reinterpret_cast<double*>(op.packed_rows + round_up(row_operand_floats(op), 2));
}

ProjectionPlan projection_plan(const HiddenProjection& op) {
  const int64_t sums = op.grad_bias ? projection_row_blocks(op.rows, kProjectionBlock) * op.d_t : 0;
  // A block of S, of W, of dS or of dW, a block of y, and one row of either side.
  const int64_t blocks = (kProjectionBlock + 1) * (projection_width(op.d_s) + projection_width(op.d_t));
  return {kProjectionBlock, weight_operand_floats(op) + op.d_t, round_up(row_operand_floats(op), 2) + 2 * sums,
          blocks + product_scratch_floats(op)};
}

// Makes what is beyond rows x columns of a block 0, as far as products read it.
inline void projection_clear(float* x, int64_t width, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; ++r) zero(x + r * width + columns, round_up(columns, 32) - columns);
  for (int64_t r = rows; r < round_up(rows, kProjectionPad); ++r) zero(x + r * width, round_up(columns, 32));
}

void projection_pack(const HiddenProjection& op, int64_t item, float* scratch) {
  const int64_t first = item * kProjectionBlock, left = op.d_t - first, n = left < kProjectionBlock ? left : kProjectionBlock;
  const int64_t width = projection_width(op.d_s);
  float *row = scratch + kProjectionBlock * width, *bias = projection_bias(op);
  for (int64_t t = 0; t < n; ++t) {
    const int64_t offset = (first + t) * op.weight_stride_row;
    const float* in = as_floats(op.weight, op.weight_dtype, offset, op.weight_stride_column, op.d_s, row);
    from_floats(in, op.d_s, scratch, DType::kF32, t * width);
    bias[first + t] = op.bias ? *as_floats(op.bias, op.bias_dtype, (first + t) * op.bias_stride, 1, 1, row) : 0;
    if (!product_takes(scratch + t * width, op.d_s)) bias[first + t] = __builtin_nanf("");
  }
  projection_clear(scratch, width, n, op.d_s);
  pack_weight(op, first, n, scratch, width, op.packed_weight);
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
  if (op.grad_matrix) hidden_gradient(op.normalize, scale, y, row_t, op.d_t, op.grad_weight, y);
  return squares;
}

void projection_rows(const HiddenProjection& op, int64_t item, float* scratch) {
  const int64_t width_s = projection_width(op.d_s), width_t = projection_width(op.d_t);
  const bool grad = op.grad_matrix;
  float *s = scratch, *y = s + kProjectionBlock * width_s, *row_s = y + kProjectionBlock * width_t, *row_t = row_s + width_s;
  float *own = row_t + width_t, *bias = projection_bias(op);
  const int64_t first = item * kProjectionBlock, left = op.rows - first, rows = left < kProjectionBlock ? left : kProjectionBlock;

  bool taken = true;
  for (int64_t r = 0; r < rows; ++r) {
    const float* row = hidden_row(op.student, op.tokens, op.real[first + r], op.d_s, row_s);
    from_floats(row, op.d_s, s, DType::kF32, r * width_s);
    taken = taken && product_takes(row, op.d_s);
  }
  projection_clear(s, width_s, rows, op.d_s);
  if (grad) pack_states(op, first, rows, s, width_s);
  multiply_states(op, rows, s, width_s, op.packed_weight, y, width_t, own);

  double total = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const float* t = hidden_row(op.teacher, op.tokens, op.real[first + r], op.d_t, row_t);
    total += projection_residual(op, bias, t, y + r * width_t, row_t);
    taken = taken && (!grad || product_takes(y + r * width_t, op.d_t));
  }
  op.partial[item] = taken ? total : __builtin_nan("");
  if (!grad) return;

  projection_clear(y, width_t, rows, op.d_t);
  if (op.grad_bias) {
    double* sums = projection_sums(op) + item * op.d_t;
    for (int64_t t = 0; t < op.d_t; ++t) sums[t] = 0;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t t = 0; t < op.d_t; ++t) sums[t] += y[r * width_t + t];
  }
  pack_gradients(op, first, rows, y, width_t);
  // Straight into the gradient where the rows are neighbours there and whole tiles.
  const bool whole = rows > 0 && rows % kProjectionPad == 0 && op.d_s % 32 == 0 && op.real[first + rows - 1] - op.real[first] == rows - 1;
  float* ds = whole ? op.grad_student + op.real[first] * op.d_s : s;
  multiply_gradients(op, rows, y, width_t, op.packed_weight, ds, whole ? op.d_s : width_s, own);
  // An item writes the gradient from its first real token (item 0: from the first token) to the next item's.
  int64_t token = first == 0 ? 0 : op.real[first];
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t real = op.real[first + r];
    zero(op.grad_student + token * op.d_s, (real - token) * op.d_s);
    if (!whole) from_floats(s + r * width_s, op.d_s, op.grad_student, DType::kF32, real * op.d_s);
    token = real + 1;
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
  const int64_t width = projection_width(op.d_s);
  const int64_t begin = item * kProjectionBlock, left = op.d_t - begin, n = left < kProjectionBlock ? left : kProjectionBlock;
  if (op.rows == 0) zero(scratch, kProjectionBlock * width);
  multiply_rows(op, begin, n, scratch, width);
  for (int64_t t = 0; t < n; ++t) put(scratch + t * width, op.d_s, op.accumulate, op.grad_matrix + (begin + t) * op.d_s);
  if (!op.grad_bias) return;
  for (int64_t t = begin; t < begin + n; ++t) {
    double total = 0;
    for (int64_t b = 0; b < projection_row_blocks(op.rows, kProjectionBlock); ++b) total += projection_sums(op)[b * op.d_t + t];
    const float rounded = static_cast<float>(total);
    put(&rounded, 1, op.accumulate, op.grad_bias + t);
  }
}
