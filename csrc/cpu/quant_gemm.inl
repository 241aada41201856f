// Integer products, exact on every ISA: sums[rows][64] = starts + a[rows, columns] values[columns, 64] with a of unsigned bytes, values of
// int8 in four groups of [columns / 4][16][4] and sums of int32. Columns: a multiple of 32; rows: at most tile_rows(). Each row has its own
// `starts`, `start_row` apart, or all have the same where that is 0; they may be the sums.
//
// AVX-512: vpdpbusd adds four products to an int32. A tile of 6 x 64 has 24 sums in registers over all columns, 4 loads and 6 broadcasts a
// step; values come from the second-level cache, 21 bytes a cycle. Sums that left the registers every 256 columns cost a tenth.
// AMX: see quant_gemm_amx.inl.
// AVX2: vpmaddubsw adds two products in int16, where 8-bit values would saturate: those are widened to int16 for vpmaddwd. Codes of 4 bits
// and less fit: 32 columns are eight such sums of at most 2 * 255 * 15, together below 2^16, so they add up in int16 from -2^15 on (below
// 4 bits from 0); then vpmaddwd by the step widens and scales them at once. The offset takes one vpmaddwd with the sum of the activations.
// So these need codes alone, which are unpacked on the way.

// What comes next, asked for beside the products into the second-level cache: AVX-512 alone is fast enough to wait for memory. Asking for
// the next tile's activations too costs more than it saves: they are in that cache already.
struct Ahead {
  const uint8_t* weights;  // `weights_step` bytes further on with every 8 columns
  int64_t weights_step;
  char* out;  // the tile of outputs to be written: 4 lines of 64 bytes a row
  int64_t out_row;
};

constexpr int64_t kVnniRows = 6;

// Rows at once: `left` in equal parts, since a tile of two rows has too few sums to keep the units busy. 8 rows are 4 and 4.
inline int64_t equal_parts(int64_t left, int64_t most) {
  const int64_t tiles = (left + most - 1) / most;
  return (left + tiles - 1) / tiles;
}

inline void start_sums(int64_t rows, const int32_t* starts, int64_t start_row, int32_t* sums) {
  for (int64_t m = 0; m < rows && starts != sums; ++m)
    __builtin_memcpy(sums + m * kPanelRows, starts + m * start_row, kPanelRows * sizeof(int32_t));
}

#if defined(__AVX512F__)

inline void dot4(vi& sum, vi a, vi b) { asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b)); }

template <int kMr>
inline void vnni_tile(int64_t columns, const uint8_t* a, int64_t lda, PanelValues b, Ahead ahead, const int32_t* starts, int64_t start_row,
                      int32_t* sums) {
  vi sum[kMr][4];
#pragma GCC unroll 6
  for (int m = 0; m < kMr; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n) sum[m][n] = _mm512_loadu_si512(starts + m * start_row + n * 16);
  for (int64_t k = 0; k < columns; k += 32, a += 32, b.values += 512) {
    if (k < 128 * kMr) __builtin_prefetch(ahead.out + k / 128 * ahead.out_row + k % 128 * 2, 0, 2);
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      if (j % 2 == 0) __builtin_prefetch(ahead.weights + j / 2 * ahead.weights_step, 0, 2);
      vi group[4];
#pragma GCC unroll 4
      for (int n = 0; n < 4; ++n) group[n] = _mm512_loadu_si512(b.values + n * b.group + j * 64);
#pragma GCC unroll 6
      for (int m = 0; m < kMr; ++m) {
        int32_t four;
        __builtin_memcpy(&four, a + m * lda + j * 4, 4);
        const vi row = _mm512_set1_epi32(four);
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n) dot4(sum[m][n], row, group[n]);
      }
    }
    ahead.weights += 4 * ahead.weights_step;
  }
#pragma GCC unroll 6
  for (int m = 0; m < kMr; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n) _mm512_store_si512(sums + m * kPanelRows + n * 16, sum[m][n]);
}

inline void vnni_tiles(int64_t rows, int64_t columns, const uint8_t* a, int64_t lda, PanelValues b, Ahead ahead, const int32_t* starts,
                       int64_t start_row, int32_t* sums) {
  switch (rows) {
    case 1: return vnni_tile<1>(columns, a, lda, b, ahead, starts, start_row, sums);
    case 2: return vnni_tile<2>(columns, a, lda, b, ahead, starts, start_row, sums);
    case 3: return vnni_tile<3>(columns, a, lda, b, ahead, starts, start_row, sums);
    case 4: return vnni_tile<4>(columns, a, lda, b, ahead, starts, start_row, sums);
    case 5: return vnni_tile<5>(columns, a, lda, b, ahead, starts, start_row, sums);
    default: return vnni_tile<6>(columns, a, lda, b, ahead, starts, start_row, sums);
  }
}

#include "quant_gemm_codes.inl"

#endif

#if defined(__AMX_INT8__)

#include "quant_gemm_amx.inl"

#elif defined(__AVX512F__)

constexpr bool kTakesPacked = false;
constexpr int64_t kTileRows = kVnniRows;

inline int64_t tile_rows(const QuantWeights&, int64_t left) { return equal_parts(left, kVnniRows); }

inline void integer_tiles(const QuantWeights& w, int64_t, int64_t, int64_t rows, int64_t columns, const uint8_t* a, PanelValues b,
                          Ahead ahead, const int32_t* starts, int64_t start_row, int32_t* sums) {
  vnni_tiles(rows, columns, a, w.depth, b, ahead, starts, start_row, sums);
}

#elif defined(__AVX2__)

inline void add32(vi& sum, vi x) { asm("vpaddd %1, %0, %0" : "+x"(sum) : "x"(x)); }
inline void add16(vi& sum, vi x) { asm("vpaddw %1, %0, %0" : "+x"(sum) : "x"(x)); }

// 8 bits: 8 output features in two vectors of 4, whose products of columns 0, 1 and of 2, 3 stay apart until the end.
template <int kMr>
inline void widened_tile(int64_t columns, const int16_t* a, const int8_t* values, int32_t* sums) {
  vi sum[kMr][2];
#pragma GCC unroll 6
  for (int m = 0; m < kMr; ++m) sum[m][0] = sum[m][1] = _mm256_setzero_si256();
  for (int64_t k = 0; k < columns; k += 4, values += 4 * kGroupRows) {
    const vi b0 = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)));
    const vi b1 = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values + 16)));
#pragma GCC unroll 6
    for (int m = 0; m < kMr; ++m) {
      int64_t four;
      __builtin_memcpy(&four, a + m * kQuantChunk + k, 8);
      const vi row = _mm256_set1_epi64x(four);
      add32(sum[m][0], _mm256_madd_epi16(row, b0));
      add32(sum[m][1], _mm256_madd_epi16(row, b1));
    }
  }
#pragma GCC unroll 6
  for (int m = 0; m < kMr; ++m) {
    vi* out = reinterpret_cast<vi*>(sums + m * kPanelRows);
    const vi both = _mm256_permute4x64_epi64(_mm256_hadd_epi32(sum[m][0], sum[m][1]), 0xd8);
    *out = _mm256_add_epi32(*out, both);
  }
}

template <int kMr>
inline void widened_rows(int64_t columns, const uint8_t* a, int64_t lda, PanelValues b, int32_t* sums) {
  alignas(32) int16_t wide[kMr * kQuantChunk];
  for (int m = 0; m < kMr; ++m)
    for (int64_t k = 0; k < columns; k += 16) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(a + m * lda + k));
      _mm256_store_si256(reinterpret_cast<vi*>(wide + m * kQuantChunk + k), _mm256_cvtepu8_epi16(bytes));
    }
  for (int n = 0; n < kPanelRows; n += 8)
    widened_tile<kMr>(columns, wide, b.values + n / kGroupRows * b.group + n % kGroupRows * 4, sums + n);
}

// A byte for each of 8 output features, in both halves of their 32 bits.
inline vi spread_bytes(vi bytes) { return _mm256_or_si256(bytes, _mm256_slli_epi32(bytes, 16)); }

// The codes of 4 columns, number j of 8 in a run, of half a group: as RunSteps has them.
template <int kBits>
inline vi half_codes(const uint8_t* packed, int j, int half) {
  const auto word = [&](int i) { return _mm256_loadu_si256(reinterpret_cast<const vi*>(packed + i * 64 + half * 32)); };
  if (kBits == 4) return _mm256_and_si256(_mm256_srli_epi16(word(j % 4), j / 4 * 4), _mm256_set1_epi8(0x0f));
  const vi low = _mm256_and_si256(_mm256_srli_epi16(word(j % 2), j / 2 * 2), _mm256_set1_epi8(0x03));
  if (kBits == 2) return low;
  const vi upper = j < 2 ? _mm256_slli_epi16(word(2), 2 - j) : _mm256_srli_epi16(word(2), j - 2);
  return _mm256_or_si256(low, _mm256_and_si256(upper, _mm256_set1_epi8(0x04)));
}

// Below 8 bits: a group of output features in two vectors, unpacked on the way. `sums_of_a`: of each row's 32 columns.
template <int kMr, int kBits>
inline void narrow_tile(int64_t columns, const uint8_t* a, int64_t lda, const int32_t* sums_of_a, const uint8_t* packed,
                        const uint8_t* steps, int32_t* sums) {
  const vi start = _mm256_set1_epi16(kBits == 4 ? -32768 : 0);
  for (int64_t run = 0; run * kCodeRun < columns; ++run, packed += kBits * 64, steps += kGroupRows) {
    vi step[2], offset[2], lift[2], sum[kMr][2];
    for (int n = 0; n < 2; ++n) {
      const vi both = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(steps + n * 8)));
      const vi one = _mm256_and_si256(both, _mm256_set1_epi32((1 << (8 - kBits)) - 1));
      const vi zero = _mm256_add_epi32(_mm256_srli_epi32(both, 8 - kBits), _mm256_set1_epi32(1 << (kBits - 1)));
      step[n] = spread_bytes(one);
      offset[n] = _mm256_srli_epi32(_mm256_madd_epi16(one, zero), 1);
      lift[n] = kBits == 4 ? _mm256_slli_epi32(one, 16) : _mm256_setzero_si256();  // what `start` takes off, in both words
    }
#pragma GCC unroll 4
    for (int m = 0; m < kMr; ++m) sum[m][0] = sum[m][1] = start;
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      const vi b0 = half_codes<kBits>(packed, j, 0), b1 = half_codes<kBits>(packed, j, 1);
#pragma GCC unroll 4
      for (int m = 0; m < kMr; ++m) {
        int32_t four;
        __builtin_memcpy(&four, a + m * lda + run * kCodeRun + j * 4, 4);
        const vi row = _mm256_set1_epi32(four);
        add16(sum[m][0], _mm256_maddubs_epi16(row, b0));
        add16(sum[m][1], _mm256_maddubs_epi16(row, b1));
      }
    }
#pragma GCC unroll 4
    for (int m = 0; m < kMr; ++m) {
      const vi of_a = _mm256_set1_epi32(sums_of_a[m * (kQuantChunk / kCodeRun) + run]);
      for (int n = 0; n < 2; ++n) {
        vi* out = reinterpret_cast<vi*>(sums + m * kPanelRows + n * 8);
        const vi less = _mm256_sub_epi32(_mm256_madd_epi16(offset[n], of_a), lift[n]);
        *out = _mm256_add_epi32(*out, _mm256_sub_epi32(_mm256_madd_epi16(sum[m][n], step[n]), less));
      }
    }
  }
}

template <int kMr, int kBits>
inline void narrow_rows(const QuantWeights& w, int64_t panel, int64_t first, int64_t columns, const uint8_t* a, int32_t* sums) {
  const int64_t lda = w.depth;
  int32_t sums_of_a[kMr * (kQuantChunk / kCodeRun)];
  for (int m = 0; m < kMr; ++m)
    for (int64_t k = 0; k < columns; k += kCodeRun) {
      const vi four = _mm256_sad_epu8(_mm256_loadu_si256(reinterpret_cast<const vi*>(a + m * lda + k)), _mm256_setzero_si256());
      sums_of_a[m * (kQuantChunk / kCodeRun) + k / kCodeRun] =
          static_cast<int32_t>(_mm256_extract_epi64(four, 0) + _mm256_extract_epi64(four, 1) + _mm256_extract_epi64(four, 2) +
                               _mm256_extract_epi64(four, 3));
    }
  for (int g = 0; g < kPanelGroups; ++g) {
    const int64_t run = code_run(w, panel, g, first);
    narrow_tile<kMr, kBits>(columns, a, lda, sums_of_a, w.codes + run * kBits * 64, w.steps + run * kGroupRows, sums + g * kGroupRows);
  }
}

template <int kBits>
inline void narrow_gemm(const QuantWeights& w, int64_t panel, int64_t first, int64_t rows, int64_t columns, const uint8_t* a,
                        int32_t* sums) {
  switch (rows) {
    case 1: return narrow_rows<1, kBits>(w, panel, first, columns, a, sums);
    case 2: return narrow_rows<2, kBits>(w, panel, first, columns, a, sums);
    case 3: return narrow_rows<3, kBits>(w, panel, first, columns, a, sums);
    default: return narrow_rows<4, kBits>(w, panel, first, columns, a, sums);
  }
}

inline void widened_gemm(int64_t rows, int64_t columns, const uint8_t* a, int64_t lda, PanelValues b, int32_t* sums) {
  switch (rows) {
    case 1: return widened_rows<1>(columns, a, lda, b, sums);
    case 2: return widened_rows<2>(columns, a, lda, b, sums);
    case 3: return widened_rows<3>(columns, a, lda, b, sums);
    case 4: return widened_rows<4>(columns, a, lda, b, sums);
    case 5: return widened_rows<5>(columns, a, lda, b, sums);
    default: return widened_rows<6>(columns, a, lda, b, sums);
  }
}

constexpr bool kTakesPacked = true;
constexpr int64_t kTileRows = 6;

inline int64_t tile_rows(const QuantWeights& w, int64_t left) { return equal_parts(left, w.bits == 8 ? 6 : 4); }

inline void integer_tiles(const QuantWeights& w, int64_t panel, int64_t first, int64_t rows, int64_t columns, const uint8_t* a,
                          PanelValues b, Ahead, const int32_t* starts, int64_t start_row, int32_t* sums) {
  start_sums(rows, starts, start_row, sums);
  for (int64_t k = 0; k < columns; k += kQuantChunk) {
    const int64_t part = columns - k < kQuantChunk ? columns - k : kQuantChunk;
    if (w.bits == 8) widened_gemm(rows, part, a + k, w.depth, {b.values + k * kGroupRows, b.group}, sums);
    if (w.bits == 4) narrow_gemm<4>(w, panel, first + k, rows, part, a + k, sums);
    if (w.bits == 3) narrow_gemm<3>(w, panel, first + k, rows, part, a + k, sums);
    if (w.bits == 2) narrow_gemm<2>(w, panel, first + k, rows, part, a + k, sums);
  }
}

#else

constexpr bool kTakesPacked = false;
constexpr int64_t kTileRows = 4;

inline int64_t tile_rows(const QuantWeights&, int64_t left) { return equal_parts(left, kTileRows); }

inline void integer_tiles(const QuantWeights& w, int64_t, int64_t, int64_t rows, int64_t columns, const uint8_t* a, PanelValues b, Ahead,
                          const int32_t* starts, int64_t start_row, int32_t* sums) {
  start_sums(rows, starts, start_row, sums);
  for (int64_t m = 0; m < rows; ++m, a += w.depth, sums += kPanelRows)
    for (int64_t k = 0; k < columns; k += 4)
      for (int64_t n = 0; n < kPanelRows; ++n) {
        const int8_t* four = b.values + n / kGroupRows * b.group + (k / 4 * kGroupRows + n % kGroupRows) * 4;
        sums[n] += a[k] * four[0] + a[k + 1] * four[1] + a[k + 2] * four[2] + a[k + 3] * four[3];
      }
}

#endif

// What integer_tiles multiplies with: values, or where it unpacks by itself (kTakesPacked) nothing that it reads.
inline PanelValues product_values(const QuantWeights& w, int64_t panel, int64_t first, int64_t columns, int8_t* scratch) {
  return kTakesPacked && w.bits < 8 ? PanelValues{scratch, 0} : panel_values(w, panel, first, columns, scratch);
}

#if !defined(__AMX_INT8__)

constexpr int64_t kFewRows = 24;

inline bool takes_few_rows(const QuantWeights& w, int64_t rows) { return w.bits < 8 && rows <= kFewRows; }

// A block of at most kFewRows rows times low bits: kQuantChunk columns at a time are unpacked to `values` and multiplied with all rows, so
// that they don't leave the first-level cache.
inline void few_rows(const QuantLinear& op, int64_t panel, int64_t first, int64_t rows, bool next_is_own, int8_t* values,
                     int32_t* sums) {
  const QuantWeights& w = op.weights;
#if defined(__AVX512F__)
  if (rows <= kCodesRows) return codes_gemm(op, panel, first, rows, next_is_own, values, sums);
#endif
  const int64_t bytes = kPanelRows * w.bits, tiles = (rows + kVnniRows - 1) / kVnniRows;  // of 8 columns
  Ahead ahead{w.codes + (panel + 1) * (w.depth / 8 * bytes), next_is_own ? bytes / tiles : 0, static_cast<char*>(op.out), 0};
  for (int64_t k = 0; k < w.depth; k += kQuantChunk) {
    const int64_t columns = w.depth - k < kQuantChunk ? w.depth - k : kQuantChunk;
    const PanelValues part = product_values(w, panel, k, columns, values);
    for (int64_t m = 0, next; m < rows; m = next, ahead.weights += columns / 8 * ahead.weights_step) {
      next = m + tile_rows(w, rows - m);
      int32_t* sum = sums + m * kPanelRows;
      const int32_t* starts = k == 0 ? w.starts + panel * kPanelRows : sum;
      integer_tiles(w, panel, k, next - m, columns, op.a + (first + m) * w.depth + k, part, ahead, starts, k == 0 ? 0 : kPanelRows, sum);
    }
  }
}

#endif
