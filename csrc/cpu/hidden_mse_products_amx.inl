// The three products of a projected layer on AMX tiles (gemm_amx.inl): what hidden_mse_products.inl does with FMAs. y = S W^T, dS = G W,
// dW = G^T S.
//
// Every operand is packed twice, once with either side as K; a block's own S and G, the A of y and dS, into the worker's scratch. G is
// split into two parts where all gradients are 16-bit: two hold 16 bits of it.

constexpr int64_t kProjectionBlock = 192, kProjectionPad = kTileBlock;
constexpr int64_t kProjectionDepth = 1024;  // of K at a time: a step's A, 1.2 MB, stays in an L2 cache of 2 MB

inline bool product_takes(const float* x, int64_t n) { return tiles_take(x, n); }

// Of S and W, and of G.
inline int64_t operand_parts(const HiddenProjection& op) {
  const auto either = [&](DType dtype) { return op.student.dtype == dtype || op.weight_dtype == dtype; };
  return either(DType::kF32) ? 3 : either(DType::kF16) ? 2 : 1;
}
inline int64_t gradient_parts(const HiddenProjection& op) { return operand_parts(op) == 3 ? 3 : 2; }

// A weight as B, for all layers that share it.
inline Tiles weight_turned(const HiddenProjection& op, float* memory) { return tiles(memory, op.d_s, operand_parts(op)); }
inline Tiles weight_straight(const HiddenProjection& op, float* memory) {
  const int64_t parts = operand_parts(op);
  return tiles(memory + tiles_floats(op.d_t, op.d_s, parts), op.d_t, parts);
}

inline int64_t weight_operand_floats(const HiddenProjection& op) {
  const int64_t parts = operand_parts(op);
  return tiles_floats(op.d_t, op.d_s, parts) + (op.grad_matrix ? tiles_floats(op.d_s, op.d_t, parts) : 0);
}

// What the rows of a layer leave for the gradient of its weight: S as B and G as A.
inline Tiles all_states(const HiddenProjection& op) { return tiles(op.packed_rows, op.rows, operand_parts(op)); }
inline Tiles all_gradients(const HiddenProjection& op) {
  return tiles(op.packed_rows + tiles_floats(op.d_s, op.rows, operand_parts(op)), op.rows, gradient_parts(op));
}

inline int64_t row_operand_floats(const HiddenProjection& op) {
  if (!op.grad_matrix) return 0;
  return tiles_floats(op.d_s, op.rows, operand_parts(op)) + tiles_floats(op.d_t, op.rows, gradient_parts(op));
}

inline int64_t product_scratch_floats(const HiddenProjection& op) {
  const int64_t states = tiles_floats(kProjectionBlock, op.d_s, operand_parts(op));
  const int64_t gradients = tiles_floats(kProjectionBlock, op.d_t, gradient_parts(op));
  return states > gradients ? states : gradients;
}

// C = A B over all of K.
inline void whole_product(const Tiles& a, int64_t line, int64_t rows, const Tiles& b, int64_t columns, float* c, int64_t ldc) {
  const TileScope scope;
  const int64_t depth = a.depth * kTileDepth;
  for (int64_t k = 0; k < depth; k += kProjectionDepth)
    tile_product_of(a.parts, b.parts)(a, line, round_up(rows, kTileBlock), b, round_up(columns, kTileBlock), k,
            depth - k < kProjectionDepth ? depth - k : kProjectionDepth, c, ldc, k > 0);
}

inline void pack_weight(const HiddenProjection& op, int64_t first, int64_t n, const float* w, int64_t stride, float* packed) {
  const int64_t rows = round_up(n, kTileBlock), columns = round_up(op.d_s, kTileBlock);
  pack_rows<true>(w, stride, rows, columns, weight_turned(op, packed), first);
  if (op.grad_matrix) pack_columns<false>(w, stride, rows, columns, weight_straight(op, packed), first);
}

inline void pack_states(const HiddenProjection& op, int64_t first, int64_t n, const float* s, int64_t stride) {
  pack_columns<false>(s, stride, round_up(n, kTileBlock), round_up(op.d_s, kTileBlock), all_states(op), first);
}

inline void pack_gradients(const HiddenProjection& op, int64_t first, int64_t n, const float* g, int64_t stride) {
  pack_columns<true>(g, stride, round_up(n, kTileBlock), round_up(op.d_t, kTileBlock), all_gradients(op), first);
}

inline void multiply_states(const HiddenProjection& op, int64_t n, const float* s, int64_t width_s, float* packed, float* y,
                            int64_t width_t, float* scratch) {
  const Tiles a = tiles(scratch, op.d_s, operand_parts(op));
  pack_rows<false>(s, width_s, round_up(n, kTileBlock), round_up(op.d_s, kTileBlock), a, 0);
  whole_product(a, 0, n, weight_turned(op, packed), op.d_t, y, width_t);
}

inline void multiply_gradients(const HiddenProjection& op, int64_t n, const float* g, int64_t width_t, float* packed, float* s,
                               int64_t width_s, float* scratch) {
  const Tiles a = tiles(scratch, op.d_t, gradient_parts(op));
  pack_rows<false>(g, width_t, round_up(n, kTileBlock), round_up(op.d_t, kTileBlock), a, 0);
  whole_product(a, 0, n, weight_straight(op, packed), op.d_s, s, width_s);
}

// Rows [begin, begin + n) of dW.
inline void multiply_rows(const HiddenProjection& op, int64_t begin, int64_t n, float* c, int64_t width_s) {
  whole_product(all_gradients(op), begin, n, all_states(op), op.d_s, c, width_s);
}
