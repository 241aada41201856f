// gram_mse's products on AMX tiles (gemm_amx.inl): what gram_mse_products.inl does with FMAs.
//
// Operands are packed a window of kGramDepth steps at a time and used at once, so that a worker needs two windows in its L2 cache, whatever
// the depth. A window is read from the tensor where it lies if it can be. E is split as gradients are elsewhere: into two parts where
// the gradients are 16-bit.

constexpr int64_t kGramBlock = 256, kGramDepth = 256;  // steps: operands of 0.4 MB, in an L2 cache of 2 MB beside the tiles of E
constexpr int64_t kGramTileWidth = kGramBlock + 16;    // an odd number of cache lines
constexpr int64_t kGramPanel = kTileBlock;             // columns of a tile on the diagonal whose rows end together
static_assert(kGramBlock % kGramPanel == 0 && kGramDepth % kTileBlock == 0);

inline int64_t gram_parts(const GramFactor& x_0, const GramFactor& x_1) {
  const auto either = [&](DType dtype) { return x_0.states.dtype == dtype || x_1.states.dtype == dtype; };
  return either(DType::kF32) ? 3 : either(DType::kF16) ? 2 : 1;
}
inline int64_t gram_difference_parts(const GramMse& op) { return gram_parts(op.s0, op.s1) == 3 ? 3 : 2; }

// Memory of a worker: two packed operands, a window and a product, and a row of floats.
struct GramOperands {
  float *a, *b, *window, *product, *row;
};

constexpr int64_t kGramOperandFloats = kGramBlock * kGramDepth * kTileParts / 2;
constexpr int64_t kGramWindowFloats = kGramDepth * (kGramDepth + 16);

inline int64_t gram_operand_floats(const GramMse&) { return 2 * kGramOperandFloats + 2 * kGramWindowFloats + kGramDepth; }

inline GramOperands gram_operands(float* memory) {
  float *b = memory + kGramOperandFloats, *window = b + kGramOperandFloats, *product = window + kGramWindowFloats;
  return {memory, b, window, product, product + kGramWindowFloats};
}

struct GramWindow {
  const float* x;
  int64_t stride;
};

// Features [feature, feature + features) of real tokens [first, first + tokens), with zeros up to whole blocks both ways. `taken`, unless
// null, becomes false where products of a row would not be exact.
inline GramWindow gram_window(const GramPair& g, const GramFactor& factor, int64_t first, int64_t tokens, int64_t feature, int64_t features,
                              const GramOperands& memory, bool* taken) {
  const StatesView& v = factor.states;
  const auto at = [&](int64_t t) {
    const int64_t token = g.token[first + t];
    return token / g.op.tokens * v.stride_batch + token % g.op.tokens * v.stride_token + feature * v.stride_feature;
  };
  const bool whole = tokens % kTileBlock == 0 && features % kTileBlock == 0;
  if (whole && v.dtype == DType::kF32 && v.stride_feature == 1 && g.token[first + tokens - 1] - g.token[first] == tokens - 1) {
    const float* x = static_cast<const float*>(v.data) + at(0);
    for (int64_t t = 0; taken && t < tokens; ++t) {
      const float* row = x + t * v.stride_token;
      for (int64_t i = 0; i < features; i += 16) __builtin_prefetch(row + 2 * v.stride_token + i);
      *taken &= tiles_take(row, features);
    }
    return {x, v.stride_token};
  }
  const int64_t width = round_up(features, kTileBlock), stride = width + 16;
  for (int64_t t = 0; t < round_up(tokens, kTileBlock); ++t) {
    float* out = memory.window + t * stride;
    int64_t filled = 0;
    if (t < tokens) {
      const float* x = as_floats(v.data, v.dtype, at(t), v.stride_feature, features, memory.row);
      if (taken) *taken &= tiles_take(x, features);
      __builtin_memcpy(out, x, features * sizeof(float));
      filled = features;
    }
    __builtin_memset(out + filled, 0, (width - filled) * sizeof(float));
  }
  return {memory.window, stride};
}

// Steps [k, k + depth) of lines [first, first + count) as A, or as B.
template <bool kIsB>
inline Tiles gram_lines(const GramPair& g, const GramFactor& x, int64_t first, int64_t count, int64_t k, int64_t depth, int64_t parts,
                        const GramOperands& memory, bool* taken) {
  const Tiles out = tiles(kIsB ? memory.b : memory.a, depth, parts);
  const int64_t lines = round_up(count, kTileBlock), steps = round_up(depth, kTileBlock);
  if (g.op.over_token) {
    const GramWindow w = gram_window(g, x, first, count, k, depth, memory, taken);
    pack_rows<kIsB>(w.x, w.stride, lines, steps, out, 0);
  } else {
    const GramWindow w = gram_window(g, x, k, depth, first, count, memory, taken);
    pack_columns<!kIsB>(w.x, w.stride, steps, lines, out, 0);
  }
  return out;
}

// tile = X_0 X_1^T of an item.
inline void gram_product(const GramPair& g, const GramFactor& x_0, const GramFactor& x_1, const GramOperands& memory, float* tile,
                         bool* taken) {
  const int64_t depth = g.depth(x_0), parts = gram_parts(x_0, x_1), rows = round_up(g.rows, kTileBlock);
  const int64_t columns = round_up(g.columns, kTileBlock);
  for (int64_t k = 0; k < depth; k += kGramDepth) {
    const int64_t steps = depth - k < kGramDepth ? depth - k : kGramDepth, whole = round_up(steps, kTileDepth);
    const Tiles a = gram_lines<false>(g, x_0, g.first_0, g.rows, k, steps, parts, memory, taken);
    const Tiles b = gram_lines<true>(g, x_1, g.first_1, g.columns, k, steps, parts, memory, taken);
    for (int64_t n = 0; n < columns; n += kGramPanel) {
      const int64_t across = columns - n < kGramPanel ? columns - n : kGramPanel;
      const int64_t reach = g.diagonal && n + across < rows ? n + across : rows;
      tile_product_of(parts, parts)(a, 0, reach, {b.at(n, 0), b.depth, b.parts}, across, 0, whole, tile + n, kGramTileWidth, k > 0);
    }
  }
}

inline bool gram_products(const GramPair& g, float* memory, float* tile, float* tile_t) {
  const TileScope scope;
  const GramOperands buffers = gram_operands(memory);
  bool taken = true;
  gram_product(g, g.op.t0, g.op.t1, buffers, tile_t, &taken);
  gram_product(g, g.op.s0, g.op.s1, buffers, tile, &taken);
  return taken;
}

// factor * A X to the gradient of lines [first, first + count): A, packed, has `inner` columns, which are lines of X from `other` on.
inline void gram_gradient(const GramPair& g, const Tiles& a, int64_t first, int64_t count, const GramFactor& x, int64_t other,
                          int64_t inner, float factor, int64_t features, const GramOperands& memory, float* grad) {
  const int64_t depth = g.depth(x), parts = gram_parts(g.op.s0, g.op.s1), stride = kGramDepth + 16;
  const int64_t rows = round_up(count, kTileBlock), steps = round_up(inner, kTileBlock);
  const Tiles b = tiles(memory.b, inner, parts);
  for (int64_t k = 0; k < depth; k += kGramDepth) {
    const int64_t across = depth - k < kGramDepth ? depth - k : kGramDepth, lines = round_up(across, kTileBlock);
    if (g.op.over_token) {
      const GramWindow w = gram_window(g, x, other, inner, k, across, memory, nullptr);
      pack_columns<false>(w.x, w.stride, steps, lines, b, 0);
    } else {
      const GramWindow w = gram_window(g, x, k, across, other, inner, memory, nullptr);
      pack_rows<true>(w.x, w.stride, lines, steps, b, 0);
    }
    tile_product_of(a.parts, parts)(a, 0, rows, b, lines, 0, steps, memory.product, stride, false);
    add_gradient(g, first, count, k, across, memory.product, stride, factor, features, memory.window, kGramTileWidth, grad);
  }
}

// Returns whether E could be split.
inline bool gram_gradients(const GramPair& g, float* memory, const float* e, float factor) {
  const TileScope scope;
  const GramMse& op = g.op;
  const GramOperands buffers = gram_operands(memory);
  const int64_t rows = round_up(g.rows, kTileBlock), columns = round_up(g.columns, kTileBlock), parts = gram_difference_parts(op);
  bool taken = true;
  for (int64_t i = 0; i < g.rows; ++i) taken &= tiles_take(e + i * kGramTileWidth, g.columns);
  const Tiles straight = tiles(buffers.a, g.columns, parts);
  pack_rows<false>(e, kGramTileWidth, rows, columns, straight, 0);
  gram_gradient(g, straight, g.first_0, g.rows, op.s1, g.first_1, g.columns, factor, op.s0.features, buffers, op.grad_0);
  if (g.diagonal) return taken;
  const Tiles turned = tiles(buffers.a, g.rows, parts);
  pack_columns<true>(e, kGramTileWidth, rows, columns, turned, 0);
  gram_gradient(g, turned, g.first_1, g.columns, op.s0, g.first_0, g.rows, factor, op.s1.features, buffers,
                op.symmetric ? op.grad_0 : op.grad_1);
  return taken;
}
