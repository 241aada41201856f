// gram_mse: sum of squares of E = a X_0 X_1^T - b Y_0 Y_1^T (X the student's, Y the teacher's factors), tile by tile, and its gradients
//   dX_0 = 2 w a E X_1,   dX_1 = 2 w a E^T X_0,   4 w a E X where X_0 and X_1 are the same
//
// A tile (I, J) of E is made, added to the loss, multiplied into rows I of dX_0 and rows J of dX_1, and forgotten. In round r block I
// meets block J = r - I (modulo the number of blocks), so that no two items of a round write the same rows, each pair meets once, and
// rows add up in the order of the rounds: nothing depends on the number of threads. A symmetric E needs the pairs with I <= J alone:
// its tile serves both blocks' gradients, and of a tile on the diagonal the upper triangle is enough.
//
// Floor for n rows of depth d_s and d_t: 2 n^2 (d_s + d_t) operations for E and 4 n^2 d_s for the gradients; half of each first two,
// n^2 (d_s + d_t), and 2 n^2 d_s where symmetric. The Gram matrices of the other side would take 2 n (d_s + d_t)^2 in double precision
// (they cancel as student and teacher come near each other), more than this below some two thousand tokens of BERT's width. Sums are
// single precision here: both products are made by the same instructions, so that equal inputs give exactly 0.

static_assert(kGramBlock % kRowPad == 0 && kGramBlock % kPanel == 0);
constexpr int64_t kGramTileWidth = kGramBlock + 16;  // of a tile's rows: an odd number of cache lines, so that they spread over cache sets

// The sizes of one sequence. Blocks of rows are packed: by rows `width` apart, padded with 0 to whole tiles, and in panels of kPanel rows
// as columns, [depth, kPanel], as gemm.inl wants its B.
struct GramTileSizes {
  int64_t n, rows_0, rows_1;    // real tokens; rows of both factors
  int64_t depth_s, depth_t;
  int64_t width_s, width_t;
};

inline int64_t gram_width(int64_t depth) { return round_up(depth, 32) + 16; }

inline GramTileSizes gram_tile_sizes(const GramMse& op, int64_t n) {
  GramTileSizes s{n, n, n, op.s0.features, op.t0.features, 0, 0};
  if (!op.over_token) s = {n, op.s0.features, op.s1.features, n, n, 0, 0};
  s.width_s = gram_width(s.depth_s);
  s.width_t = gram_width(s.depth_t);
  return s;
}

struct GramTileBuffers {
  float *rows_0, *rows_1, *panels_1;  // the student's block I by rows, and J by rows and in panels
  float *rows_t, *panels_t;           // the teacher's I by rows and J in panels
  float *tile, *tile_t, *product, *spare, *row;
};

// Lays the buffers out in `scratch`; returns the number of floats. With a null scratch it only counts.
inline int64_t gram_tile_buffers(const GramMse& op, float* scratch, GramTileBuffers& b) {
  int64_t used = 0;
  const auto take = [&](int64_t floats) {
    float* p = scratch ? scratch + used : nullptr;
    used += round_up(floats, 16);
    return p;
  };
  const GramTileSizes s = gram_tile_sizes(op, op.tokens);
  b.rows_0 = take(kGramBlock * s.width_s);
  b.rows_1 = take(kGramBlock * s.width_s);
  b.panels_1 = take(kGramBlock * s.width_s);
  b.rows_t = take(kGramBlock * s.width_t);
  b.panels_t = take(kGramBlock * s.width_t);
  b.tile = take(kGramBlock * kGramTileWidth);
  b.tile_t = take(kGramBlock * kGramTileWidth);
  b.product = take(kGramBlock * s.width_s);
  b.spare = take(kGramTileWidth * (s.width_s > s.width_t ? s.width_s : s.width_t));
  b.row = take(op.over_token ? (s.depth_s > s.depth_t ? s.depth_s : s.depth_t) : kGramBlock);
  return used;
}

int64_t gram_scratch(const GramMse& op) {
  GramTileBuffers unused;
  return gram_tile_buffers(op, nullptr, unused);
}

// Rows [first, first + count) over tokens where they lie, if tiles and panels can be made from them there: null if not.
inline const float* rows_in_place(const GramMse& op, const GramFactor& x, const int64_t* token, int64_t first, int64_t count) {
  const StatesView& v = x.states;
  const bool whole = op.over_token && count == kGramBlock && x.features % W == 0;
  const bool plain = v.dtype == DType::kF32 && v.stride_feature == 1;
  if (!whole || !plain || token[first + count - 1] - token[first] != count - 1) return nullptr;
  return static_cast<const float*>(v.data) + token[first] / op.tokens * v.stride_batch + token[first] % op.tokens * v.stride_token;
}

// Rows [first, first + count) of a factor, of a sequence whose real tokens are `token`: by rows and in panels, where not null. One form is
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

// Adds factor * product to rows [first, first + count) of a factor's gradient.
inline void add_gradient(const GramMse& op, const int64_t* token, int64_t first, int64_t count, int64_t depth, int64_t width,
                         const float* product, float factor, int64_t features, float* spare, float* grad) {
  const auto add = [&](const float* in, int64_t n, float* out) {
    for_vectors(n, [&](int64_t i, int64_t lanes) {
      store_up_to(out + i, fma(set1(factor), load_up_to(in + i, lanes, 0), load_up_to(out + i, lanes, 0)), lanes);
    });
  };
  if (op.over_token) {
    for (int64_t r = 0; r < count; ++r) add(product + r * width, depth, grad + token[first + r] * features);
    return;
  }
  transpose(product, width, round_up(count, W), round_up(depth, W), spare, kGramTileWidth);
  for (int64_t k = 0; k < depth; ++k) add(spare + k * kGramTileWidth, count, grad + token[k] * features + first);
}

void gram_tile(const GramMse& op, int64_t item, float* scratch) {
  const int64_t round = item / (op.batch * op.blocks), sequence = item / op.blocks % op.batch, block_0 = item % op.blocks;
  const int64_t block_1 = (round + op.blocks - block_0) % op.blocks;
  const int64_t* token = op.real + op.first[sequence];
  const GramTileSizes s = gram_tile_sizes(op, op.first[sequence + 1] - op.first[sequence]);
  const int64_t first_0 = block_0 * kGramBlock, first_1 = block_1 * kGramBlock;
  op.partial[item] = 0;
  if (s.n == 0 || first_0 >= s.rows_0 || first_1 >= s.rows_1 || (op.symmetric && block_1 < block_0)) return;
  const int64_t rows = s.rows_0 - first_0 < kGramBlock ? s.rows_0 - first_0 : kGramBlock;
  const int64_t columns = s.rows_1 - first_1 < kGramBlock ? s.rows_1 - first_1 : kGramBlock;
  const bool diagonal = op.symmetric && block_0 == block_1;
  GramTileBuffers b;
  gram_tile_buffers(op, scratch, b);

  const float* teacher = rows_in_place(op, op.t0, token, first_0, rows);
  const int64_t stride_t = teacher ? op.t0.states.stride_token : s.width_t;
  pack_factor(op, op.t0, token, first_0, rows, s.depth_t, s.width_t, teacher ? nullptr : b.rows_t, diagonal ? b.panels_t : nullptr, b.spare,
              b.row);
  if (!diagonal) pack_factor(op, op.t1, token, first_1, columns, s.depth_t, s.width_t, nullptr, b.panels_t, b.spare, b.row);
  gram_product(rows, columns, s.depth_t, teacher ? teacher : b.rows_t, stride_t, b.panels_t, diagonal, b.tile_t);
  pack_factor(op, op.s0, token, first_0, rows, s.depth_s, s.width_s, b.rows_0, diagonal ? b.panels_1 : nullptr, b.spare, b.row);
  if (!diagonal) pack_factor(op, op.s1, token, first_1, columns, s.depth_s, s.width_s, b.rows_1, b.panels_1, b.spare, b.row);
  gram_product(rows, columns, s.depth_s, b.rows_0, s.width_s, b.panels_1, diagonal, b.tile);

  // E over the student's scale: where both scales are the same the difference is rounded once.
  const double scale_s = 1.0 / (op.over_token ? s.depth_s : s.n), scale_t = 1.0 / (op.over_token ? s.depth_t : s.n);
  const vf ratio = set1(static_cast<float>(scale_t / scale_s));
  double squares = 0;
  for (int64_t i = 0; i < rows; ++i) {
    float* e = b.tile + i * kGramTileWidth;
    const float* t = b.tile_t + i * kGramTileWidth;
    for (int64_t j = 0; diagonal && j < i; ++j) e[j] = b.tile[j * kGramTileWidth + i];
    const int64_t begin = diagonal ? i : 0;
    const double row = hidden_sum(columns - begin, [&](int64_t j, int64_t lanes) {
      const vf d = load_up_to(e + begin + j, lanes, 0) - ratio * load_up_to(t + begin + j, lanes, 0);
      store_up_to(e + begin + j, d, lanes);
      return d * d;
    });
    squares += diagonal ? 2 * row - static_cast<double>(e[i]) * e[i] : row;
  }
  const bool twice = op.symmetric && !diagonal;
  op.partial[item] = (twice ? 2 : 1) * squares * scale_s * scale_s;
  if (!op.grad_0) return;
  const float factor = static_cast<float>((op.symmetric ? 4 : 2) * op.weight * scale_s * scale_s);
  const int64_t across = round_up(s.depth_s, W);
  float* other_grad = op.symmetric ? op.grad_0 : op.grad_1;
  gemm<false>(round_up(rows, kRowPad), across, columns, b.tile, kGramTileWidth, 1, diagonal ? b.rows_0 : b.rows_1, s.width_s, kPanel,
              b.product, s.width_s);
  add_gradient(op, token, first_0, rows, s.depth_s, s.width_s, b.product, factor, op.s0.features, b.spare, op.grad_0);
  if (diagonal) return;
  gemm<false>(round_up(columns, kRowPad), across, rows, b.tile, 1, kGramTileWidth, b.rows_0, s.width_s, kPanel, b.product, s.width_s);
  add_gradient(op, token, first_1, columns, s.depth_s, s.width_s, b.product, factor, op.s1.features, b.spare, other_grad);
}
