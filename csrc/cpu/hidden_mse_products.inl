// The three products of a projected layer with FMAs on packed panels (gemm.inl): y = S W^T, dS = G W, dW = G^T S.
//
// B is W^T or W in panels of kPanel columns, made once for all layers that share a weight, and S in panels for dW. A is S or G by rows, and
// for dW G in groups of kRowPad columns, so that the numbers a tile broadcasts lie together.

// A multiple of kRowPad; an item reads the whole other operand, which 96 rows outweigh, and 768 features make eight items.
constexpr int64_t kProjectionBlock = 96, kProjectionPad = kRowPad;

// Whether products are as exact as fp32 for numbers of this size.
inline bool product_takes(const float*, int64_t) { return true; }

inline int64_t panels_floats(int64_t columns, int64_t depth, int64_t width) { return round_up(columns, width) * depth; }

inline int64_t weight_operand_floats(const HiddenProjection& op) {
  return panels_floats(op.d_t, op.d_s, kPanel) + (op.grad_matrix ? panels_floats(op.d_s, op.d_t, kPanel) : 0);
}

inline int64_t row_operand_floats(const HiddenProjection& op) {
  return op.grad_matrix ? panels_floats(op.d_s, op.rows, kPanel) + panels_floats(op.d_t, op.rows, kRowPad) : 0;
}

inline int64_t product_scratch_floats(const HiddenProjection&) { return 0; }

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

inline float* weight_straight(const HiddenProjection& op, float* packed) { return packed + panels_floats(op.d_t, op.d_s, kPanel); }

inline void pack_weight(const HiddenProjection& op, int64_t first, int64_t n, const float* w, int64_t stride, float* packed) {
  const int64_t last = first + n, end = last == op.d_t ? round_up(last, kPanel) : last;  // what the last panel has more is 0
  for (int64_t t = first; t < end; ++t) {
    const float* row = w + (t - first) * stride;
    float* column = packed + t / kPanel * op.d_s * kPanel + t % kPanel;
    for (int64_t k = 0; k < op.d_s; ++k) column[k * kPanel] = t < last ? row[k] : 0;
  }
  if (op.grad_matrix) store_in_panels(w, stride, op.d_s, op.d_t, first, n, kPanel, weight_straight(op, packed));
}

inline void pack_states(const HiddenProjection& op, int64_t first, int64_t n, const float* s, int64_t stride) {
  store_in_panels(s, stride, op.d_s, op.rows, first, n, kPanel, op.packed_rows);
}

inline float* all_gradients(const HiddenProjection& op) { return op.packed_rows + panels_floats(op.d_s, op.rows, kPanel); }

inline void pack_gradients(const HiddenProjection& op, int64_t first, int64_t n, const float* g, int64_t stride) {
  store_in_panels(g, stride, op.d_t, op.rows, first, n, kRowPad, all_gradients(op));
}

inline void multiply_states(const HiddenProjection& op, int64_t n, const float* s, int64_t width_s, float* packed, float* y,
                            int64_t width_t, float*) {
  panel_product<false>(round_up(n, kRowPad), op.d_t, op.d_s, s, width_s, packed, y, width_t);
}

inline void multiply_gradients(const HiddenProjection& op, int64_t n, const float* g, int64_t width_t, float* packed, float* s,
                               int64_t width_s, float*) {
  panel_product<false>(round_up(n, kRowPad), op.d_s, op.d_t, g, width_t, weight_straight(op, packed), s, width_s);
}

// Rows [begin, begin + n) of dW.
inline void multiply_rows(const HiddenProjection& op, int64_t begin, int64_t n, float* c, int64_t width_s) {
  panel_product<true>(round_up(n, kRowPad), op.d_s, op.rows, all_gradients(op) + begin * op.rows, 0, op.packed_rows, c, width_s);
}
