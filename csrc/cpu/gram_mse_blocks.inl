// What gram_mse's products share, whatever multiplies: one item's place in E, its buffers' strides, and where a gradient goes.
//
// E = a X_0 X_1^T - b Y_0 Y_1^T of one sequence; an item has lines [first_0, first_0 + rows) of X_0 and Y_0 and lines [first_1, first_1 +
// columns) of X_1 and Y_1. Over tokens a line is a token, and its depth the features; over the hidden axis the other way round.

struct GramPair {
  const GramMse& op;
  const int64_t* token = nullptr;  // the sequence's n real tokens
  int64_t n = 0, first_0 = 0, rows = 0, first_1 = 0, columns = 0;
  bool diagonal = false;  // of a symmetric E: the upper triangle is enough

  int64_t depth(const GramFactor& x) const { return op.over_token ? x.features : n; }
};

// The tile of an item; false where there is none: past the last line, or below the diagonal of a symmetric E.
inline bool gram_pair(const GramMse& op, int64_t item, GramPair& g) {
  const int64_t round = item / (op.batch * op.blocks), sequence = item / op.blocks % op.batch, block_0 = item % op.blocks;
  const int64_t block_1 = (round + op.blocks - block_0) % op.blocks;
  g.token = op.real + op.first[sequence];
  g.n = op.first[sequence + 1] - op.first[sequence];
  g.first_0 = block_0 * op.block;
  g.first_1 = block_1 * op.block;
  g.diagonal = op.symmetric && block_0 == block_1;
  const int64_t left_0 = (op.over_token ? g.n : op.s0.features) - g.first_0, left_1 = (op.over_token ? g.n : op.s1.features) - g.first_1;
  g.rows = left_0 < op.block ? left_0 : op.block;
  g.columns = left_1 < op.block ? left_1 : op.block;
  return g.n > 0 && g.rows > 0 && g.columns > 0 && !(op.symmetric && block_1 < block_0);
}

// The deepest that a line gets.
inline int64_t gram_depth(const GramMse& op, const GramFactor& x) { return op.over_token ? x.features : op.tokens; }

// Adds factor * product, [count, depth], to steps [k, k + depth) of lines [first, first + count) of a factor's gradient. Over the hidden
// axis by way of `turned`, [depth, turned_width], both rounded up to whole vectors.
inline void add_gradient(const GramPair& g, int64_t first, int64_t count, int64_t k, int64_t depth, const float* product, int64_t width,
                         float factor, int64_t features, float* turned, int64_t turned_width, float* grad) {
  const auto add = [&](const float* in, int64_t n, float* out) {
    for_vectors(n, [&](int64_t i, int64_t lanes) {
      store_up_to(out + i, fma(set1(factor), load_up_to(in + i, lanes, 0), load_up_to(out + i, lanes, 0)), lanes);
    });
  };
  if (g.op.over_token) {
    for (int64_t r = 0; r < count; ++r) add(product + r * width, depth, grad + g.token[first + r] * features + k);
    return;
  }
  transpose(product, width, round_up(count, W), round_up(depth, W), turned, turned_width);
  for (int64_t i = 0; i < depth; ++i) add(turned + i * turned_width, count, grad + g.token[k + i] * features + first);
}
