// gram_mse: sum of squares of E = a X_0 X_1^T - b Y_0 Y_1^T (X the student's, Y the teacher's factors), tile by tile, and its gradients
//   dX_0 = 2 w a E X_1,   dX_1 = 2 w a E^T X_0,   4 w a E X where X_0 and X_1 are the same
//
// A tile (I, J) of E is made, added to the loss, multiplied into rows I of dX_0 and rows J of dX_1, and forgotten. In round r block I
// meets block J = r - I (modulo the number of blocks), so that no two items of a round write the same rows, each pair meets once, and
// rows add up in the order of the rounds: nothing depends on the number of threads. A symmetric E needs the pairs with I <= J alone:
// its tile serves both blocks' gradients, and of a tile on the diagonal the upper triangle is enough. The products are those of
// gram_mse_products.inl or, on AMX, gram_mse_products_amx.inl: numbers that those don't take make the loss NaN.
//
// Floor for n rows of depth d_s and d_t: 2 n^2 (d_s + d_t) operations for E and 4 n^2 d_s for the gradients; half of each first two,
// n^2 (d_s + d_t), and 2 n^2 d_s where symmetric. The Gram matrices of the other side would take 2 n (d_s + d_t)^2 in double precision
// (they cancel as student and teacher come near each other), more than this below some two thousand tokens of BERT's width. Sums are
// single precision here: both products are made by the same instructions, so that equal inputs give exactly 0.

int64_t gram_scratch(const GramMse& op) { return 2 * gram_tile_floats(op) + gram_operand_floats(op); }

void gram_tile(const GramMse& op, int64_t item, float* scratch) {
  GramPair g{op};
  op.partial[item] = 0;
  if (!gram_pair(op, item, g)) return;
  float *tile = scratch, *tile_t = tile + gram_tile_floats(op), *memory = tile_t + gram_tile_floats(op);
  const double scale_s = 1.0 / g.depth(op.s0), scale_t = 1.0 / g.depth(op.t0);
  bool taken = gram_products(g, memory, tile, tile_t);
  const double squares = gram_differences(g, static_cast<float>(scale_t / scale_s), tile, tile_t);
  if (op.grad_0) {
    const float factor = static_cast<float>((op.symmetric ? 4 : 2) * op.weight * scale_s * scale_s);
    taken = gram_gradients(g, memory, tile, factor) && taken;
  }
  op.partial[item] = taken ? (op.symmetric && !g.diagonal ? 2 : 1) * squares * scale_s * scale_s : __builtin_nan("");
}
