// Rows of activations to 8 bits: q = round(x / scale), |q| <= 127, stored as q + 128 in unsigned bytes (VNNI multiplies unsigned by
// signed), with scale = max|x| / 127 of the row, or one that is given. Two passes, the second over a row in the first-level cache.
//
// What is not finite behaves as in the float model: a row that holds NaN gets the scale NaN, one that holds Inf the scale Inf and
// codes of +-127 where x is infinite, 0 elsewhere. The scale never falls below the smallest normal number, so 1 / scale is finite.

inline void store_codes(uint8_t* p, vf q) {
#if defined(__AVX512F__)
  const __m128i bytes = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(q));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_xor_si128(bytes, _mm_set1_epi8(-128)));
#elif defined(__AVX2__)
  const __m256i words = _mm256_cvtps_epi32(q);
  const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_xor_si128(_mm_packs_epi16(halves, halves), _mm_set1_epi8(-128)));
#else
  const vf rounded = round_even(q);
  for (int i = 0; i < W; ++i) p[i] = static_cast<uint8_t>(static_cast<int32_t>(rounded[i] == rounded[i] ? rounded[i] : 0) + 128);
#endif
}

constexpr int64_t kCodeColumns = 64;  // whose codes lie together, whatever the layout

// Whether tiles multiply these weights (quant_gemm_amx.inl); blocks of 32 columns with a scale each are half a tile.
#if defined(__AMX_INT8__)
inline bool tiled(const QuantWeights& w) { return w.segments == 1 || w.segment % kCodeColumns == 0; }
#else
inline bool tiled(const QuantWeights&) { return false; }
#endif

// A row's codes: those of columns [k, k + 64) from at(k) on.
struct CodeRow {
  uint8_t* codes;
  int64_t step;

  CodeRow(const QuantLinear& op, int64_t row) {
    const int64_t depth = op.weights.depth, lane = row % 16;
    codes = op.a + (tiled(op.weights) ? (row - lane) * depth + lane * kCodeColumns : row * depth);
    step = tiled(op.weights) ? 16 * kCodeColumns : kCodeColumns;
  }
  uint8_t* at(int64_t k) const { return codes + k / kCodeColumns * step; }
};

// 64 of x * inverse to codes. A row's own scale keeps them within 127; kClip: one that is given does not.
template <bool kClip>
inline void store_64_codes(const float* x, float inverse, uint8_t* a) {
  const vf times = set1(inverse), most = set1(127.0f);
  const auto code = [&](int64_t k) { return kClip ? vmax(-most, vmin(most, load(x + k) * times)) : load(x + k) * times; };
#if defined(__AVX512F__)
  const __m512i lanes = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);  // packing is done within 128 bits
  const auto two = [&](int64_t i) { return _mm512_packs_epi32(_mm512_cvtps_epi32(code(i)), _mm512_cvtps_epi32(code(i + W))); };
  const __m512i bytes = _mm512_permutexvar_epi32(lanes, _mm512_packs_epi16(two(0), two(2 * W)));
  _mm512_storeu_si512(a, _mm512_xor_si512(bytes, _mm512_set1_epi8(-128)));
#else
  for (int64_t k = 0; k < kCodeColumns; k += W) store_codes(a + k, code(k));
#endif
}

// The bits of the largest magnitude: as integers they are ordered as the floats are, with NaN above Inf above all numbers.
inline int32_t largest_bits(const float* x, int64_t n) {
  vi32 most[4] = {};
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W)
    for (int j = 0; j < 4; ++j) {
      const vi32 bits = reinterpret_cast<vi32>(vabs(load(x + i + j * W)));
      most[j] = bits > most[j] ? bits : most[j];
    }
  for (; i < n; i += W) {
    const vf part = n - i < W ? load_n(x + i, n - i, 0.0f) : load(x + i);
    const vi32 bits = reinterpret_cast<vi32>(vabs(part));
    most[0] = bits > most[0] ? bits : most[0];
  }
  for (int j = 1; j < 4; ++j) most[0] = most[j] > most[0] ? most[j] : most[0];
  int32_t result = 0;
  for (int lane = 0; lane < W; ++lane) result = most[0][lane] > result ? most[0][lane] : result;
  return result;
}

inline int64_t row_offset(const RowsView& x, int64_t row) { return row / x.inner * x.stride_outer + row % x.inner * x.stride_inner; }

// A row of x as floats, times the weights' scales of columns; in `scratch` unless it can be read where it is.
inline const float* activations(const QuantLinear& op, int64_t row, int64_t first, int64_t n, float* scratch) {
  const RowsView& x = op.x;
  const float* p = as_floats(x.data, x.dtype, row_offset(x, row) + first * x.stride_column, x.stride_column, n, scratch);
  if (!op.weights.column_scales) return p;
  for (int64_t k = 0; k < n; ++k) scratch[k] = p[k] * op.weights.column_scales[first + k];
  return scratch;
}

inline void quantize_row(const QuantLinear& op, int64_t row, float* scratch) {
  constexpr int32_t kInfinity = 0x7f800000;
  const QuantWeights& w = op.weights;
  const float* x = activations(op, row, 0, w.columns, scratch);
  const CodeRow codes(op, row);
  const int32_t bits = largest_bits(x, w.columns);
  float largest;
  __builtin_memcpy(&largest, &bits, 4);
  float scale = op.static_scale > 0 && bits < kInfinity ? op.static_scale : largest / 127.0f;
  if (scale < __FLT_MIN__) scale = __FLT_MIN__;
  op.a_scale[row] = scale;
  const float inverse = 1.0f / scale;
  const float* next = x == scratch ? x : x + op.x.stride_inner;  // mostly the next row, which comes from further away than this one
  for (int64_t k = 0; k < w.depth; k += kCodeColumns) {
    alignas(64) float rest[kCodeColumns] = {};
    const float* from = x + k;
    if (w.columns - k < kCodeColumns) {
      for (int64_t i = k; i < w.columns; ++i) rest[i - k] = x[i];
      from = rest;
    }
    uint8_t* to = codes.at(k);
    for (int64_t i = 0; i < kCodeColumns; i += 16) __builtin_prefetch(next + k + i);
    if (bits == kInfinity)
      for (int64_t i = 0; i < kCodeColumns; ++i)
        to[i] = static_cast<uint8_t>(128 + (__builtin_isinf(from[i]) ? (from[i] > 0 ? 127 : -127) : 0));
    else if (op.static_scale > 0)
      store_64_codes<true>(from, inverse, to);
    else
      store_64_codes<false>(from, inverse, to);
  }
  if (!op.a_sums) return;
  for (int64_t segment = 0; segment < w.segments; ++segment) {
    const int64_t end = segment + 1 == w.segments ? w.depth : (segment + 1) * w.segment;
    int32_t sum = 0;
    for (int64_t k = segment * w.segment; k < end; ++k) sum += (codes.at(k)[k % kCodeColumns] - 128) * w.column_zeros[k];
    op.a_sums[row * w.segments + segment] = sum;
  }
}

// One item = kQuantizedRows rows. scratch: `depth` floats.
void quantize_rows(const QuantLinear& op, int64_t item, float* scratch) {
  const int64_t first = item * kQuantizedRows, end = first + kQuantizedRows < op.rows ? first + kQuantizedRows : op.rows;
  for (int64_t row = first; row < end; ++row) quantize_row(op, row, scratch);
}
