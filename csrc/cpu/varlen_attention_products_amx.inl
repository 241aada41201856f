// The two products of varlen_attention on AMX tiles (gemm_amx.inl), on operands of three parts, which hold a float: with fewer the context
// would differ by more than the rounding that decides between two of its codes.

constexpr int64_t kAttentionParts = 3;
constexpr int64_t kScoreRows = kTileBlock, kScoreColumns = kTileBlock;  // queries and keys are padded to these
static_assert(kQueryBlock % kScoreRows == 0 && kKeyBlock % kScoreColumns == 0);

struct AttentionBuffers {
  Tiles q, keys, values, weights;
  float *scores, *out, *rows, *row, *largest, *total;
  int64_t size, width;  // of a head; in whole blocks of tiles
};

inline int64_t lay_out_attention(const VarlenAttention& op, float* scratch, AttentionBuffers& b) {
  Floats memory{scratch};
  const auto take_tiles = [&](int64_t lines, int64_t depth) {
    return tiles(memory.take(tiles_floats(lines, depth, kAttentionParts)), depth, kAttentionParts);
  };
  b.size = op.size;
  b.width = round_up(op.size, kTileBlock);
  b.q = take_tiles(kQueryBlock, b.width);
  b.keys = take_tiles(kKeyBlock, b.width);
  b.values = take_tiles(b.width, kKeyBlock);
  b.weights = take_tiles(kQueryBlock, kKeyBlock);
  b.scores = memory.take(kQueryBlock * kKeyBlock);
  b.out = memory.take(kQueryBlock * b.width);
  b.rows = memory.take(kKeyBlock * b.width);
  b.row = memory.take(b.width);
  b.largest = memory.take(kQueryBlock);
  b.total = memory.take(kQueryBlock);
  return memory.taken;
}

// To the nearest bf16, in the upper half; NaN stays NaN.
inline vu32 nearest_bf16(vf x) {
  const vu32 bits = reinterpret_cast<vu32>(x), rounded = bits + 0x7fff + (bits >> 16 & 1);
  return (x == x ? rounded : bits | 0x400000) & 0xffff0000u;
}

// Takes the next part off x, rounded to nearest; of what is not finite the rest is 0, so that infinities stay what they are.
inline vu32 take_nearest(vf& x) {
  const vu32 upper = nearest_bf16(x);
  const vf rest = x - reinterpret_cast<vf>(upper);
  x = (rest == rest ? rest : vf{});
  return upper;
}

// A tile of each part, as pack_tile lays them.
template <bool kTurned>
inline void pack_nearest(const float* x, int64_t stride, int64_t beside, char* tile) {
  alignas(64) float lines[kAttentionParts][kTileLines * W];
  for (int64_t i = 0; i < kTileLines; ++i) {
    vf a = load(x + i * stride), b = load(x + i * stride + beside);
    for (int64_t part = 0; part < kAttentionParts; ++part) {
      const vu32 low = take_nearest(a), high = take_nearest(b);
      store(lines[part] + i * W, reinterpret_cast<vf>(low >> 16 | high));
    }
  }
  for (int64_t part = 0; part < kAttentionParts; ++part, tile += kTileBytes) {
    if (kTurned) transpose_square(lines[part], W, reinterpret_cast<float*>(tile), W);
    else __builtin_memcpy(tile, lines[part], kTileBytes);
  }
}

// n rows, whole tiles of them, as the lines of an operand: A, or B where kTurned.
template <bool kTurned>
inline void pack_nearest_rows(const float* x, int64_t stride, int64_t n, int64_t columns, const Tiles& to) {
  for (int64_t i = 0; i < n; i += kTileLines)
    for (int64_t k = 0; k < columns; k += kTileDepth) pack_nearest<kTurned>(x + i * stride + k, stride, kTileLines, to.at(i, k));
}

inline void pack_queries(const VarlenAttention& op, const AttentionBuffers& b, int64_t first, int64_t n, int64_t rows, int64_t head) {
  copy_head(op.q, first, n, rows, head, b.size, b.width, b.out, b.row);
  pack_nearest_rows<false>(b.out, b.width, rows, b.width, b.q);
}

inline void pack_keys(const VarlenAttention& op, const AttentionBuffers& b, int64_t first, int64_t n, int64_t columns, int64_t head) {
  copy_head(op.k, first, n, columns, head, b.size, b.width, b.rows, b.row);
  pack_nearest_rows<true>(b.rows, b.width, columns, b.width, b.keys);
}

// Lines are the columns, and steps the keys.
inline void pack_values(const VarlenAttention& op, const AttentionBuffers& b, int64_t first, int64_t n, int64_t columns, int64_t head) {
  copy_head(op.v, first, n, columns, head, b.size, b.width, b.rows, b.row);
  for (int64_t key = 0; key < columns; key += kTileDepth)
    for (int64_t line = 0; line < b.width; line += kTileLines)
      pack_nearest<false>(b.rows + key * b.width + line, b.width, kTileLines * b.width, b.values.at(line, key));
}

inline void multiply_keys(const AttentionBuffers& b, int64_t rows, int64_t columns) {
  const TileScope scope;
  tile_product<kAttentionParts, kAttentionParts>(b.q, 0, rows, b.keys, columns, 0, b.width, b.scores, kKeyBlock, false);
}

inline void multiply_values(const AttentionBuffers& b, int64_t rows, int64_t columns) {
  pack_nearest_rows<false>(b.scores, kKeyBlock, rows, columns, b.weights);
  const TileScope scope;
  tile_product<kAttentionParts, kAttentionParts>(b.weights, 0, rows, b.values, b.width, 0, columns, b.out, b.width, true);
}

// Infinities are no sums of parts: where products came out as NaN, the kernel of FMAs, whose scratch is smaller, says what they are.
inline bool leave_to_fmas(const VarlenAttention& op, const AttentionBuffers& b, int64_t queries, int64_t item, float* scratch) {
  vi32 nan{};
  for (int64_t i = 0; i < queries * b.width; i += W) {
    const vf x = load(b.out + i);
    nan |= x != x;
  }
  if (!_mm512_test_epi32_mask(reinterpret_cast<vi>(nan), reinterpret_cast<vi>(nan))) return false;
  avx512::table.varlen_attention(op, item, scratch);
  return true;
}
