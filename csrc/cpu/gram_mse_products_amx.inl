// gram_mse's products on AMX tiles (gemm_amx.inl): what gram_mse_products.inl does with FMAs.
//
// E is made a window of kGramDepth steps at a time: its lines are packed, multiplied and added to the tile, so that what a worker packs
// and the tiles of E stay in its L2 cache whatever the depth. On the diagonal one reading serves both sides of the product. For the
// gradients E is packed kTileBlock lines at a time and meets all lines of the other factor. E is split as gradients are elsewhere:
// into two parts where the gradients are 16-bit.
//
// A tile of E is panels of kTileBlock columns, [rows, kTileBlock] each, so that what a product has in registers lies in one page. On the
// diagonal a panel ends with the square on the diagonal.

constexpr int64_t kGramDepth = 128;  // steps of a window: a panel of kTileBlock lines, 24 KB, stays in an L1 cache while all others pass by
constexpr int64_t kGramAcross = 384;  // steps of a gradient at once: of 512 lines 1.2 MB, in an L2 cache of 2 MB beside half of E
static_assert(kGramDepth % kTileDepth == 0 && kGramAcross % kTileBlock == 0);

// Lines of a block. A sequence that is one block reads and packs every line once for E and once for the gradients; where there are few
// sequences, blocks are what threads share.
inline int64_t gram_block(int64_t batch, int64_t lines) {
  const int64_t longest = batch < 8 ? 256 : 512;
  return lines > 0 && lines <= longest ? round_up(lines, kTileBlock) : 256;
}

// Floats of a tile before the panel of `column`.
inline int64_t gram_panel_begin(int64_t block, bool diagonal, int64_t column) {
  return diagonal ? column * (column + kTileBlock) / 2 : column * block;
}

inline int64_t gram_tile_floats(const GramMse& op) { return gram_panel_begin(op.block, op.symmetric && op.blocks == 1, op.block); }

// The panel of a tile that starts with `column`, from `row` on.
template <typename T>
inline T* gram_panel(const GramPair& g, T* tile, int64_t column, int64_t row) {
  return tile + gram_panel_begin(g.op.block, g.diagonal, column) + row * kTileBlock;
}

inline int64_t gram_parts(const GramFactor& x_0, const GramFactor& x_1) {
  const auto either = [&](DType dtype) { return x_0.states.dtype == dtype || x_1.states.dtype == dtype; };
  return either(DType::kF32) ? 3 : either(DType::kF16) ? 2 : 1;
}
inline int64_t gram_difference_parts(const GramMse& op) { return gram_parts(op.s0, op.s1) == 3 ? 3 : 2; }

// Memory of a worker: two packed operands, what tokens are copied to that tiles can't be packed from where they lie, and kTileBlock lines
// of a gradient.
struct GramOperands {
  float *a, *b, *window, *product;
};

constexpr int64_t kGramProductFloats = kTileBlock * (kGramAcross + 16);

// Of a window, whose memory is also that of a product turned around.
inline int64_t gram_window_floats(const GramMse& op) {
  const int64_t widest = op.block > kGramAcross ? op.block : kGramAcross, turned = kGramAcross * (kTileBlock + 16);
  return kTileBlock * (widest + 16) > turned ? kTileBlock * (widest + 16) : turned;
}

inline int64_t gram_operand_floats(const GramMse& op) {
  const int64_t a = tiles_floats(op.block, kGramDepth, kTileParts), gradient_a = tiles_floats(kTileBlock, op.block, kTileParts);
  return (a > gradient_a ? a : gradient_a) + tiles_floats(kGramAcross, op.block, kTileParts) + gram_window_floats(op) + kGramProductFloats;
}

inline GramOperands gram_operands(const GramMse& op, float* memory) {
  float *window = memory + kGramProductFloats, *b = window + gram_window_floats(op);
  return {b + tiles_floats(kGramAcross, op.block, kTileParts), b, window, memory};
}

// Calls pack(x, stride, token, feature, features) for the real tokens [first, first + tokens), kTileBlock at a time, and their features
// [feature, feature + features): where they lie if they can be packed from there, else as floats, with zeros up to whole blocks both ways.
template <typename Pack>
inline void gram_windows(const GramPair& g, const GramFactor& factor, int64_t first, int64_t tokens, int64_t feature, int64_t features,
                         float* window, const Pack& pack) {
  const StatesView& v = factor.states;
  const auto at = [&](int64_t t, int64_t i) {
    const int64_t token = g.token[first + t];
    return token / g.op.tokens * v.stride_batch + token % g.op.tokens * v.stride_token + (feature + i) * v.stride_feature;
  };
  for (int64_t t = 0; t < tokens; t += kTileBlock) {
    const int64_t here = tokens - t < kTileBlock ? tokens - t : kTileBlock;
    const bool dense = here == kTileBlock && v.stride_feature == 1 && g.token[first + t + here - 1] - g.token[first + t] == here - 1;
    const int64_t in_place = dense ? features / kTileBlock * kTileBlock : 0, rest = features - in_place;
    const auto pack_in_place = [&](const auto* x) {
      if (in_place) pack(x + at(t, 0), v.stride_token, t, 0, in_place);
    };
    if (v.dtype == DType::kF32) pack_in_place(static_cast<const float*>(v.data));
    if (v.dtype == DType::kBF16) pack_in_place(static_cast<const Bf16*>(v.data));
    if (v.dtype == DType::kF16) pack_in_place(static_cast<const F16*>(v.data));
    if (!rest) continue;
    const int64_t width = round_up(rest, kTileBlock), stride = width + 16;
    for (int64_t i = 0; i < kTileBlock; ++i) {
      float* row = window + i * stride;
      const int64_t filled = i < here ? rest : 0;
      if (filled) {
        const float* x = as_floats(v.data, v.dtype, at(t + i, in_place), v.stride_feature, rest, row);
        if (x != row) __builtin_memcpy(row, x, rest * sizeof(float));
      }
      __builtin_memset(row + filled, 0, (width - filled) * sizeof(float));
    }
    pack(window, stride, t, in_place, width);
  }
}

// Packs a block of rows, kTileBlock of them, straight and turned, to where either's operand is not null.
template <bool kColumns, typename T>
inline void gram_pack(const T* x, int64_t stride, int64_t columns, int64_t line, int64_t k, const Tiles* straight, const Tiles* turned,
                      int64_t parts) {
  alignas(64) char spare[kTileParts * kTileBytes];
  for (int64_t i = 0; i < kTileBlock; i += kColumns ? kTileDepth : kTileLines)
    for (int64_t j = 0; j < columns; j += kColumns ? kTileLines : kTileDepth) {
      const int64_t to_line = line + (kColumns ? j : i), to_k = k + (kColumns ? i : j);
      char* tile = straight ? straight->at(to_line, to_k) : spare;
      split_tile(x + i * stride + j, stride, kColumns ? kTileLines * stride : kTileLines, parts, tile);
      if (turned) turn_tile(tile, parts, turned->at(to_line, to_k));
    }
}

// Steps [k, k + depth) of lines [first, first + count), as A and as B, where not null.
inline void gram_lines(const GramPair& g, const GramFactor& x, int64_t first, int64_t count, int64_t k, int64_t depth, int64_t parts,
                       float* window, const Tiles* a, const Tiles* b) {
  if (g.op.over_token)
    gram_windows(g, x, first, count, k, depth, window, [&](const auto* rows, int64_t stride, int64_t line, int64_t step, int64_t steps) {
      gram_pack<false>(rows, stride, steps, line, step, a, b, parts);
    });
  else
    gram_windows(g, x, k, depth, first, count, window, [&](const auto* rows, int64_t stride, int64_t step, int64_t line, int64_t lines) {
      gram_pack<true>(rows, stride, lines, line, step, b, a, parts);
    });
}

// tile = X_0 X_1^T of an item.
inline void gram_product(const GramPair& g, const GramFactor& x_0, const GramFactor& x_1, const GramOperands& memory, float* tile) {
  const int64_t depth = g.depth(x_0), parts = gram_parts(x_0, x_1), rows = round_up(g.rows, kTileBlock);
  for (int64_t k = 0; k < depth; k += kGramDepth) {
    const int64_t steps = depth - k < kGramDepth ? depth - k : kGramDepth;
    const Tiles a = tiles(memory.a, steps, parts), b = tiles(memory.b, steps, parts);
    gram_lines(g, x_0, g.first_0, g.rows, k, steps, parts, memory.window, &a, g.diagonal ? &b : nullptr);
    if (!g.diagonal) gram_lines(g, x_1, g.first_1, g.columns, k, steps, parts, memory.window, nullptr, &b);
    for (int64_t n = 0; n < g.columns; n += kTileBlock)
      tile_product_of(parts, parts)(a, 0, g.diagonal ? n + kTileBlock : rows, {b.at(n, 0), b.depth, b.parts}, kTileBlock, 0,
                                    round_up(steps, kTileDepth), gram_panel(g, tile, n, 0), kTileBlock, k > 0);
  }
}

// Whether tiles take lines [first, first + count).
inline bool gram_takes(const GramPair& g, const GramFactor& x, int64_t first, int64_t count, float* window) {
  const StatesView& v = x.states;
  const int64_t token = g.op.over_token ? first : 0, tokens = g.op.over_token ? count : g.n;
  const int64_t feature = g.op.over_token ? 0 : first, end = g.op.over_token ? x.features : first + count;
  bool taken = true;
  for (int64_t t = token; t < token + tokens; ++t)
    for (int64_t i = feature; i < end; i += kGramAcross) {
      const int64_t at = g.token[t] / g.op.tokens * v.stride_batch + g.token[t] % g.op.tokens * v.stride_token + i * v.stride_feature;
      const int64_t n = end - i < kGramAcross ? end - i : kGramAcross;
      taken &= tiles_take(as_floats(v.data, v.dtype, at, v.stride_feature, n, window), n);
    }
  return taken;
}

// The same of both factors of a tile, each line in one of the items that have it. A symmetric product has the lines' sums of squares on its
// diagonal, which mostly tell.
inline bool gram_takes(const GramPair& g, const GramFactor& x_0, const GramFactor& x_1, const float* tile, float* window) {
  if (!g.op.symmetric) {
    const bool taken = g.first_1 > 0 || gram_takes(g, x_0, g.first_0, g.rows, window);
    return (g.first_0 > 0 || gram_takes(g, x_1, g.first_1, g.columns, window)) && taken;
  }
  bool large = true;
  for (int64_t i = 0; g.diagonal && i < g.rows; ++i)
    large &= gram_panel(g, tile, i / kTileBlock * kTileBlock, i)[i % kTileBlock] >= 0x1p-120f;
  return large || gram_takes(g, x_0, g.first_0, g.rows, window);
}

// Both tiles, of the student and of the teacher, of `g`. Returns whether these products are as exact as fp32.
inline bool gram_products(const GramPair& g, float* memory, float* tile, float* tile_t) {
  const GramMse& op = g.op;
  const GramOperands buffers = gram_operands(op, memory);
  {
    const TileScope scope;
    gram_product(g, op.t0, op.t1, buffers, tile_t);
    gram_product(g, op.s0, op.s1, buffers, tile);
  }
  const bool taken = gram_takes(g, op.t0, op.t1, tile_t, buffers.window);
  return gram_takes(g, op.s0, op.s1, tile, buffers.window) && taken;
}

// E in the student's tile, over the student's scale: where both scales are the same the difference is rounded once. Returns its sum of
// squares.
inline double gram_differences(const GramPair& g, float ratio, float* tile, const float* tile_t) {
  double squares = 0;
  for (int64_t n = 0; n < g.columns; n += kTileBlock) {
    const int64_t rows = g.diagonal ? n + kTileBlock : round_up(g.rows, kTileBlock);
    for (int64_t m = 0; m < rows; m += kTileBlock) {
      float* e = gram_panel(g, tile, n, m);
      const float* t = gram_panel(g, tile_t, n, m);
      const double of_block = hidden_sum(kTileBlock * kTileBlock, [&](int64_t i, int64_t) {
        const vf d = load(e + i) - ratio * load(t + i);
        store(e + i, d);
        return d * d;
      });
      squares += g.diagonal && m < n ? 2 * of_block : of_block;
    }
  }
  return squares;
}

// Lines [line, line + kTileBlock) of E, or of E^T: those of its numbers before `turned` are columns of e, the others rows.
struct GramLines {
  const GramPair& g;
  const float* e;
  int64_t line, turned, inner;
};

inline bool gram_lines_take(const GramLines& x) {
  vf of_columns[kTileBlock / W]{};
  const float* panel = gram_panel(x.g, x.e, x.line, 0);
  for (int64_t i = 0; i < x.turned * kTileBlock; i += kTileBlock)
    for (int64_t j = 0; j < kTileBlock / W; ++j) of_columns[j] = vmax(of_columns[j], vabs(load(panel + i + j * W)));
  bool taken = true;
  for (int64_t i = 0; i < kTileBlock; ++i) {
    vf largest = set1(of_columns[i / W][i % W]);
    for (int64_t k = x.turned; k < x.inner; k += kTileBlock)
      for (int64_t j = 0; j < kTileBlock; j += W) largest = vmax(largest, vabs(load(gram_panel(x.g, x.e, k, x.line + i) + j)));
    taken &= tiles_hold(max(largest));
  }
  return taken;
}

inline void pack_gram_lines(const GramLines& x, const Tiles& a) {
  pack_columns<true>(gram_panel(x.g, x.e, x.line, 0), kTileBlock, x.turned, kTileBlock, a, 0);
  for (int64_t k = x.turned; k < x.inner; k += kTileBlock)
    pack_rows<false>(gram_panel(x.g, x.e, k, x.line), kTileBlock, kTileBlock, kTileBlock, {a.at(0, k), a.depth, a.parts}, 0);
}

// factor * A X to the gradient of lines [first, first + count), where A is E or, `turned`, E^T, and has `inner` columns, which are lines of
// X from `other` on. Returns whether E could be split.
inline bool gram_gradient(const GramPair& g, const float* e, bool turned, int64_t first, int64_t count, const GramFactor& x, int64_t other,
                          int64_t inner, float factor, int64_t features, const GramOperands& memory, float* grad) {
  constexpr int64_t kWidth = kGramAcross + 16;
  const int64_t depth = g.depth(x), parts = gram_parts(g.op.s0, g.op.s1), steps = round_up(inner, kTileBlock);
  const Tiles a = tiles(memory.a, inner, gram_difference_parts(g.op)), b = tiles(memory.b, inner, parts);
  bool taken = true;
  for (int64_t k = 0; k < depth; k += kGramAcross) {
    const int64_t across = depth - k < kGramAcross ? depth - k : kGramAcross, lines = round_up(across, kTileBlock);
    if (g.op.over_token)
      gram_windows(g, x, other, inner, k, across, memory.window, [&](const auto* rows, int64_t stride, int64_t step, int64_t i, int64_t n) {
        gram_pack<true>(rows, stride, n, i, step, &b, nullptr, parts);
      });
    else
      gram_windows(g, x, k, across, other, inner, memory.window, [&](const auto* rows, int64_t stride, int64_t i, int64_t step, int64_t n) {
        gram_pack<false>(rows, stride, n, i, step, nullptr, &b, parts);
      });
    for (int64_t line = 0; line < count; line += kTileBlock) {
      const GramLines of_e{g, e, line, g.diagonal ? line : turned ? steps : 0, steps};
      if (k == 0) taken &= gram_lines_take(of_e);
      pack_gram_lines(of_e, a);
      for (int64_t step = 0; step < steps; step += kGramDepth)
        tile_product_of(a.parts, parts)(a, 0, kTileBlock, b, lines, step, steps - step < kGramDepth ? steps - step : kGramDepth,
                                        memory.product, kWidth, step > 0);
      add_gradient(g, first + line, count - line < kTileBlock ? count - line : kTileBlock, k, across, memory.product, kWidth, factor,
                   features, memory.window, kTileBlock + 16, grad);
    }
  }
  return taken;
}

inline bool gram_gradients(const GramPair& g, float* memory, const float* e, float factor) {
  const TileScope scope;
  const GramMse& op = g.op;
  const GramOperands buffers = gram_operands(op, memory);
  const bool taken = gram_gradient(g, e, false, g.first_0, g.rows, op.s1, g.first_1, g.columns, factor, op.s0.features, buffers, op.grad_0);
  if (g.diagonal) return taken;
  return gram_gradient(g, e, true, g.first_1, g.columns, op.s0, g.first_0, g.rows, factor, op.s1.features, buffers,
                       op.symmetric ? op.grad_0 : op.grad_1) && taken;
}
