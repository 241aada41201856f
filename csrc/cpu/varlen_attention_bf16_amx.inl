// varlen_attention of bf16 queries, keys and values on AMX tiles: they are operands as they are, so a score takes one product. Weights are
// two bf16 parts, 16 bits, more than the context is rounded to.
//
// 32 queries pass through both products and the softmax between them while their scores are in the first-level cache. Steps of K lie in
// their own order here, two a dword: keys are turned dword by dword, and two keys' values interleaved.

constexpr int64_t kWeightParts = 2;

struct NarrowBuffers {
  Tiles q, keys, values, weights;
  float *scores, *out, *largest, *total;
  int64_t width;  // of a head, in whole blocks of tiles
};

inline int64_t lay_out_narrow(const VarlenAttention& op, float* scratch, NarrowBuffers& b) {
  Floats memory{scratch};
  const auto take_tiles = [&](int64_t lines, int64_t depth, int64_t parts) {
    return tiles(memory.take(tiles_floats(lines, depth, parts)), depth, parts);
  };
  b.width = round_up(op.size, kTileBlock);
  b.q = take_tiles(kQueryBlock, b.width, 1);
  b.keys = take_tiles(kKeyBlock, b.width, 1);
  b.values = take_tiles(b.width, kKeyBlock, 1);
  b.weights = take_tiles(kTileBlock, kKeyBlock, kWeightParts);
  b.scores = memory.take(kTileBlock * kKeyBlock);
  b.out = memory.take(kQueryBlock * b.width);
  b.largest = memory.take(kQueryBlock);
  b.total = memory.take(kQueryBlock);
  return memory.taken;
}

inline bool takes_narrow(const VarlenAttention& op) {
  const auto narrow = [](const TokensView& x) { return x.dtype == DType::kBF16 && x.stride_column == 1; };
  return narrow(op.q) && narrow(op.k) && narrow(op.v);
}

// A head's tokens from `first` on, n of them: 32 columns of a token, zeros behind the head and behind the last token.
struct HeadRows {
  const uint16_t* data;
  int64_t stride, n, size;

  HeadRows(const TokensView& x, int64_t first, int64_t n, int64_t head, int64_t size)
      : data(static_cast<const uint16_t*>(x.data) + first * x.stride_token + head * size), stride(x.stride_token), n(n), size(size) {}

  __m512i operator()(int64_t row, int64_t column) const {
    if (row >= n || column >= size) return _mm512_setzero_si512();
    const int64_t left = size - column;
    return _mm512_maskz_loadu_epi16(left < 32 ? (1u << left) - 1 : ~0u, data + row * stride + column);
  }
};

inline void pack_queries(const HeadRows& x, int64_t rows, const NarrowBuffers& b) {
  for (int64_t k = 0; k < b.width; k += kTileDepth)
    for (int64_t m = 0; m < rows; ++m) _mm512_store_si512(b.q.at(m, k) + m % kTileLines * 64, x(m, k));
}

inline void pack_keys(const HeadRows& x, int64_t columns, const NarrowBuffers& b) {
  for (int64_t n = 0; n < columns; n += kTileLines)
    for (int64_t k = 0; k < b.width; k += kTileDepth) {
      vf line[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) line[i] = _mm512_castsi512_ps(x(n + i, k));
      transpose_step<1>(line);
      transpose_step<2>(line);
      transpose_step<4>(line);
      transpose_step<8>(line);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) store(reinterpret_cast<float*>(b.keys.at(n, k)) + i * W, line[i]);
    }
}

inline void pack_values(const HeadRows& x, int64_t columns, const NarrowBuffers& b) {
  alignas(64) uint16_t order[32];
  for (int i = 0; i < 32; ++i) order[i] = static_cast<uint16_t>(i / 2 + i % 2 * 32);
  const __m512i lower = _mm512_load_si512(order), upper = _mm512_add_epi16(lower, _mm512_set1_epi16(16));
  for (int64_t key = 0; key < columns; key += 2)
    for (int64_t line = 0; line < b.width; line += 2 * kTileLines) {
      const __m512i even = x(key, line), odd = x(key + 1, line);
      const int64_t at = key % kTileDepth * 32;
      _mm512_store_si512(b.values.at(line, key) + at, _mm512_permutex2var_epi16(even, lower, odd));
      _mm512_store_si512(b.values.at(line + kTileLines, key) + at, _mm512_permutex2var_epi16(even, upper, odd));
    }
}

// 32 weights, none of them negative, as a line of each part's tile.
inline void store_weights(vf low, vf high, char* line) {
  const __m512i first = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
  const auto widen = [](__m256i half) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16)); };
  const vf rest_low = low - widen(_mm512_castsi512_si256(first)), rest_high = high - widen(_mm512_extracti64x4_epi64(first, 1));
  _mm512_store_si512(line, first);
  _mm512_store_si512(line + kTileBytes, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(rest_high, rest_low)));
}

// softmax_block for query `m` of the block, whose scores are `row`, with weights to tiles. `before`: earlier keys left sums.
inline void softmax_to_tiles(const NarrowBuffers& b, int64_t m, const float* row, int64_t keys, int64_t columns, vf times, bool before) {
  vf most = set1(b.largest[m]), total{};
  for_vectors(keys, [&](int64_t i, int64_t lanes) { most = vmax(load_up_to(row + i, lanes, -__FLT_MAX__), most); });
  const float largest = max(most);
  const auto weight = [&](int64_t i) {
    if (i >= keys) return vf{};
    const vf p = exp2_scaled(load_up_to(row + i, keys - i < W ? keys - i : W, -__builtin_inff()) - largest, times);
    total += p;
    return p;
  };
  char* line = b.weights.at(m % kTileBlock, 0) + m % kTileLines * 64;
  for (int64_t i = 0; i < columns; i += kTileDepth, line += kWeightParts * kTileBytes) {
    const vf low = weight(i);
    store_weights(low, weight(i + W), line);
  }
  const vf earlier = exp2_scaled(set1(b.largest[m] - largest), times);
  b.total[m] = b.total[m] * earlier[0] + sum(total);
  b.largest[m] = largest;
  float* out = b.out + m * b.width;
  for (int64_t k = 0; before && k < b.width; k += W) store(out + k, load(out + k) * earlier);
}

void varlen_attention_narrow(const VarlenAttention& op, const AttentionItem& item, float* scratch) {
  NarrowBuffers b;
  lay_out_narrow(op, scratch, b);
  const int64_t rows = round_up(item.queries, kTileBlock);
  const vf times = set1(op.scale * kLog2E);
  pack_queries(HeadRows(op.q, item.first, item.queries, item.head, op.size), rows, b);
  for (int64_t m = 0; m < item.queries; ++m) {
    b.largest[m] = -__FLT_MAX__;
    b.total[m] = 0;
  }
  const TileScope scope;
  for (int64_t key = item.begin; key < item.end; key += kKeyBlock) {
    const int64_t keys = item.end - key < kKeyBlock ? item.end - key : kKeyBlock, columns = round_up(keys, kTileBlock);
    const bool before = key > item.begin;
    pack_keys(HeadRows(op.k, key, keys, item.head, op.size), columns, b);
    pack_values(HeadRows(op.v, key, keys, item.head, op.size), columns, b);
    for (int64_t m = 0; m < rows; m += kTileBlock) {
      asm volatile("" ::: "memory");  // see TileScope
      tile_product<1, 1>(b.q, m, kTileBlock, b.keys, columns, 0, b.width, b.scores, columns, false);
      for (int64_t i = m; i < item.queries && i < m + kTileBlock; ++i)
        softmax_to_tiles(b, i, b.scores + (i - m) * columns, keys, columns, times, before);
      asm volatile("" ::: "memory");
      tile_product<kWeightParts, 1>(b.weights, 0, kTileBlock, b.values, b.width, 0, columns, b.out + m * b.width, b.width, before);
    }
  }
  finish_attention(op, item, b.out, b.width, b.total);
}
