// gram_mse's products with FMAs on packed panels (gemm.inl).
//
// A block of lines is packed by rows, padded with 0 to whole tiles, as A and as the B of gradients, and in panels of kPanel lines as
// columns, [depth, kPanel], as the B of E.

// Lines of a block, whole tiles and panels on every ISA: its operands fit into an L2 cache of 2 MiB up to 768 features, and packing them is
// small beside their product.
constexpr int64_t kGramBlock = 192;
constexpr int64_t kGramTileWidth = kGramBlock + 16;  // of a tile's rows: an odd number of cache lines, so that they spread over cache sets
static_assert(kGramBlock % kRowPad == 0 && kGramBlock % kPanel == 0);

inline int64_t gram_block(int64_t, int64_t) { return kGramBlock; }
inline int64_t gram_tile_floats(const GramMse&) { return kGramBlock * kGramTileWidth; }

inline int64_t gram_width(int64_t depth) { return round_up(depth, 32) + 16; }

struct GramOperands {
  int64_t width_s, width_t;
  float *rows_0, *rows_1, *panels_1;  // the student's block of X_0 by rows, and of X_1 by rows and in panels
  float *rows_t, *panels_t;           // the teacher's of Y_0 by rows and of Y_1 in panels
  float *product, *spare, *row;
};

// Lays the operands out in `scratch`; returns the number of floats. With a null scratch it only counts.
inline int64_t gram_operands(const GramMse& op, float* scratch, GramOperands& b) {
  int64_t used = 0;
  const auto take = [&](int64_t floats) {
    float* p = scratch ? scratch + used : nullptr;
    used += round_up(floats, 16);
    return p;
  };
  const int64_t depth_s = gram_depth(op, op.s0), depth_t = gram_depth(op, op.t0), deepest = depth_s > depth_t ? depth_s : depth_t;
  b.width_s = gram_width(depth_s);
  b.width_t = gram_width(depth_t);
  b.rows_0 = take(kGramBlock * b.width_s);
  b.rows_1 = take(kGramBlock * b.width_s);
  b.panels_1 = take(kGramBlock * b.width_s);
  b.rows_t = take(kGramBlock * b.width_t);
  b.panels_t = take(kGramBlock * b.width_t);
  b.product = take(kGramBlock * b.width_s);
  b.spare = take(kGramTileWidth * gram_width(deepest));
  b.row = take(op.over_token ? deepest : kGramBlock);
  return used;
}

inline int64_t gram_operand_floats(const GramMse& op) {
  GramOperands unused;
  return gram_operands(op, nullptr, unused);
}

// Lines [first, first + count) over tokens where they lie, if tiles and panels can be made from them there: null if not.
inline const float* rows_in_place(const GramMse& op, const GramFactor& x, const int64_t* token, int64_t first, int64_t count) {
  const StatesView& v = x.states;
  const bool whole = op.over_token && count == kGramBlock && x.features % W == 0;
  const bool plain = v.dtype == DType::kF32 && v.stride_feature == 1;
  if (!whole || !plain || token[first + count - 1] - token[first] != count - 1) return nullptr;
  return static_cast<const float*>(v.data) + token[first] / op.tokens * v.stride_batch + token[first] % op.tokens * v.stride_token;
}

// Lines [first, first + count) of a factor, of a sequence whose real tokens are `token`: by rows and in panels, where not null. One form is
// read from the tensor, over tokens the rows and over the hidden axis the panels, and the other is its transpose; `spare` holds the
// first where only the second is wanted.
inline void pack_factor(const GramMse& op, const GramFactor& x, const int64_t* token, int64_t first, int64_t count, int64_t depth,
                        int64_t width, float* rows, float* panels, float* spare, float* scratch) {
  if (const float* source = rows ? nullptr : rows_in_place(op, x, token, first, count)) {
    for (int64_t p = 0; panels && p < count; p += kPanel)
      transpose(source + p * x.states.stride_token, x.states.stride_token, kPanel, depth, panels + p * depth, kPanel);
    return;
  }
  const int64_t filled = round_up(count, kPanel), padded = round_up(count, kRowPad);
  if (op.over_token) {
    float* packed = rows ? rows : spare;
    for (int64_t r = 0; r < (filled > padded ? filled : padded); ++r) {
      float* out = packed + r * width;
      if (r < count) from_floats(hidden_row(x.states, op.tokens, token[first + r], depth, scratch), depth, out, DType::kF32, 0);
      const int64_t begin = r < count ? depth : 0;
      __builtin_memset(out + begin, 0, (round_up(depth, W) - begin) * sizeof(float));
    }
    for (int64_t p = 0; panels && p < count; p += kPanel)
      transpose(packed + p * width, width, kPanel, round_up(depth, W), panels + p * depth, kPanel);
    return;
  }
  float* packed = panels ? panels : spare;
  for (int64_t k = 0; k < depth; ++k) {
    const StatesView& v = x.states;
    const int64_t offset = token[k] / op.tokens * v.stride_batch + token[k] % op.tokens * v.stride_token + first * v.stride_feature;
    const float* row = as_floats(v.data, v.dtype, offset, v.stride_feature, count, scratch);
    for (int64_t p = 0; p < count; p += kPanel) {
      float* out = packed + p * depth + k * kPanel;
      const int64_t here = count - p < kPanel ? count - p : kPanel;
      __builtin_memcpy(out, row + p, here * sizeof(float));
      __builtin_memset(out + here, 0, (kPanel - here) * sizeof(float));
    }
  }
  if (!rows) return;
  for (int64_t p = 0; p < count; p += kPanel)
    transpose(packed + p * depth, kPanel, round_up(depth, W), kPanel, rows + p * width, width);
  for (int64_t r = filled; r < padded; ++r) __builtin_memset(rows + r * width, 0, depth * sizeof(float));
}

// tile = A B^T for packed blocks; of a block with itself the upper triangle, by panels.
inline void gram_product(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t width, const float* panels, bool upper,
                         float* tile) {
  const int64_t padded = round_up(rows, kRowPad);
  for (int64_t n = 0; n < columns; n += kPanel) {
    const int64_t across = columns - n < kPanel ? columns - n : kPanel, reach = round_up(n + across, kRowPad);
    panel_product<false>(upper && reach < padded ? reach : padded, across, depth, a, width, panels + n * depth, tile + n,
                              kGramTileWidth);
  }
}

// Both tiles, of the student and of the teacher, of `g`. Returns whether these products are as exact as fp32.
inline bool gram_products(const GramPair& g, float* memory, float* tile, float* tile_t) {
  const GramMse& op = g.op;
  GramOperands b;
  gram_operands(op, memory, b);
  const int64_t depth_s = g.depth(op.s0), depth_t = g.depth(op.t0);
  const float* teacher = rows_in_place(op, op.t0, g.token, g.first_0, g.rows);
  const int64_t stride_t = teacher ? op.t0.states.stride_token : b.width_t;
  pack_factor(op, op.t0, g.token, g.first_0, g.rows, depth_t, b.width_t, teacher ? nullptr : b.rows_t, g.diagonal ? b.panels_t : nullptr,
              b.spare, b.row);
  if (!g.diagonal) pack_factor(op, op.t1, g.token, g.first_1, g.columns, depth_t, b.width_t, nullptr, b.panels_t, b.spare, b.row);
  gram_product(g.rows, g.columns, depth_t, teacher ? teacher : b.rows_t, stride_t, b.panels_t, g.diagonal, tile_t);
  pack_factor(op, op.s0, g.token, g.first_0, g.rows, depth_s, b.width_s, b.rows_0, g.diagonal ? b.panels_1 : nullptr, b.spare, b.row);
  if (!g.diagonal) pack_factor(op, op.s1, g.token, g.first_1, g.columns, depth_s, b.width_s, b.rows_1, b.panels_1, b.spare, b.row);
  gram_product(g.rows, g.columns, depth_s, b.rows_0, b.width_s, b.panels_1, g.diagonal, tile);
  return true;
}

// E in the student's tile, over the student's scale: where both scales are the same the difference is rounded once. Returns its sum of
// squares; a tile on the diagonal is filled in below it.
inline double gram_differences(const GramPair& g, float ratio, float* tile, const float* tile_t) {
  double squares = 0;
  for (int64_t i = 0; i < g.rows; ++i) {
    const int64_t square = g.diagonal ? i / W * W : 0, beyond = g.diagonal ? square + W : g.columns;
    const auto sum_of = [&](int64_t begin, int64_t end) {
      float* e = tile + i * kGramTileWidth + begin;
      const float* t = tile_t + i * kGramTileWidth + begin;
      return hidden_sum(end - begin, [&](int64_t j, int64_t lanes) {
        const vf d = load_up_to(e + j, lanes, 0) - ratio * load_up_to(t + j, lanes, 0);
        store_up_to(e + j, d, lanes);
        return d * d;
      });
    };
    squares += sum_of(square, beyond < g.columns ? beyond : g.columns);
    if (beyond < g.columns) squares += 2 * sum_of(beyond, g.columns);
  }
  for (int64_t i = W; g.diagonal && i < g.rows; i += W)
    for (int64_t j = 0; j < i; j += W)
      transpose_square(tile + j * kGramTileWidth + i, kGramTileWidth, tile + i * kGramTileWidth + j, kGramTileWidth);
  return squares;
}

// factor * E X_1 and factor * E^T X_0, or the former alone on the diagonal, to the gradients, after gram_products.
inline bool gram_gradients(const GramPair& g, float* memory, const float* e, float factor) {
  const GramMse& op = g.op;
  GramOperands b;
  gram_operands(op, memory, b);
  const int64_t depth = g.depth(op.s0), across = round_up(depth, W);
  gemm<false>(round_up(g.rows, kRowPad), across, g.columns, e, kGramTileWidth, 1, g.diagonal ? b.rows_0 : b.rows_1, b.width_s, kPanel,
              b.product, b.width_s);
  add_gradient(g, g.first_0, g.rows, 0, depth, b.product, b.width_s, factor, op.s0.features, b.spare, kGramTileWidth, op.grad_0);
  if (g.diagonal) return true;
  gemm<false>(round_up(g.columns, kRowPad), across, g.rows, e, 1, kGramTileWidth, b.rows_0, b.width_s, kPanel, b.product, b.width_s);
  add_gradient(g, g.first_1, g.columns, 0, depth, b.product, b.width_s, factor, op.s1.features, b.spare, kGramTileWidth,
               op.symmetric ? op.grad_0 : op.grad_1);
  return true;
}
