// Up to kCodesRows rows times codes of 4, 3 and 2 bits on AVX-512: codes are multiplied as they are, and steps and offsets applied to the
// sums of a run of 32 columns, since beside so few products unpacking (see quant_unpack.inl) is most of the work:
//
//   sum over a run of (step * code - offset) * a = step * (sum of code * a) - offset * (sum of a),   a of signed bytes
//
// A byte holds two codes, or is made to (nibbles). Masks take them out, the upper one as 16 times itself, which takes no shift: codes are
// the unsigned operand of vpdpbusd. 16 products of a code and an activation are at most 16 * 15 * 127 < 2^15, so the sum of lower and that
// of upper codes fit in one int32 side by side, and vpdpwssd multiplies both by the step. For 16 output features and a run that is 8
// masks, 8 products a row, 3.5 for the steps a row and some 5 to read them: 24 instructions at 4 bits and one row, where unpacking first
// takes 42. 2 bits take 2 more, 3 bits 9.

constexpr int64_t kCodesRows = 4;
constexpr int kGroupsAtOnce = 2;  // share loads of activations; more of them would be more streams of codes to fetch

inline void dot2(vi& sum, vi a, vi b) { asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b)); }

// Activations of a block: 64 columns of all rows lie together, and so do their sums.
struct SignedRows {
  int8_t* codes;       // [depth / 64][rows][64]: a - 128
  int32_t* less;       // [depth / 64][rows]: minus the sums of two runs, 16 bits each
  int64_t rows, depth;
};

inline void sign_row(const CodeRow& from, int64_t m, const SignedRows& to) {
  constexpr int64_t kTogether = 4 * kCodeColumns;
  for (int64_t k = 0; k < to.depth; k += kTogether) {
    const int64_t vectors = to.depth - k < kTogether ? (to.depth - k) / kCodeColumns : 4, at = k / kCodeColumns * to.rows + m;
    vi sums = _mm512_setzero_si512();  // of 8 columns in 64 bits, of a vector in 16 of them
    for (int64_t i = 0; i < vectors; ++i) {
      const vi a = _mm512_loadu_si512(from.at(k + i * kCodeColumns));
      _mm512_storeu_si512(to.codes + (at + i * to.rows) * kCodeColumns, _mm512_xor_si512(a, _mm512_set1_epi8(-128)));
      sums = _mm512_or_si512(sums, _mm512_sllv_epi64(_mm512_sad_epu8(a, _mm512_setzero_si512()), _mm512_set1_epi64(16 * i)));
    }
    sums = _mm512_add_epi16(sums, _mm512_shuffle_epi32(sums, _MM_PERM_BADC));
    sums = _mm512_add_epi16(sums, _mm512_shuffle_i64x2(sums, sums, 0xb1));
    const __m128i pairs = _mm_unpacklo_epi16(_mm512_castsi512_si128(sums), _mm512_extracti32x4_epi32(sums, 2));
    alignas(16) int32_t less[4];
    _mm_store_si128(reinterpret_cast<__m128i*>(less), _mm_sub_epi16(_mm_set1_epi16(128 * kCodeRun), pairs));
    for (int64_t i = 0; i < vectors; ++i) to.less[at + i * to.rows] = less[i];
  }
}

// The codes of vector j of a run in the lower bits of each half byte, and of vector j + 4 in those of the upper.
template <int kBits>
inline vi nibbles(const uint8_t* codes, int j) {
  const auto load = [codes](int i) {  // GCC would load once for each mask
    vi vector;
    asm("vmovdqu64 %1, %0" : "=v"(vector) : "m"(*reinterpret_cast<const vi*>(codes + i * 64)));
    return vector;
  };
  if constexpr (kBits == 4) return load(j);
  const vi two = j < 2 ? load(j) : _mm512_srli_epi16(load(j - 2), 2);
  if constexpr (kBits == 2) return two;
  const vi one = j < 2 ? _mm512_slli_epi16(load(2), 2 - j) : j == 2 ? load(2) : _mm512_srli_epi16(load(2), 1);
  constexpr int kSelect = 0xca;  // two where the mask has ones, elsewhere one
  return _mm512_ternarylogic_epi32(_mm512_set1_epi8(0x33), two, one, kSelect);
}

// Steps and offsets of two runs side by side, 16 bits each. `packed`: for each of two runs 16 bytes of step | zero << kStepBits.
template <int kBits>
inline void read_steps(const uint8_t* packed, vi& steps, vi& offsets) {
  constexpr int kStepBits = 8 - kBits;
  alignas(64) static constexpr uint16_t kPairs[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const vi runs = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed)));
  const vi both = _mm512_permutexvar_epi16(_mm512_load_si512(kPairs), runs);
  steps = _mm512_and_si512(both, _mm512_set1_epi16((1 << kStepBits) - 1));
  // Zeros in their place, with 2^(kBits - 1) beside them: the product has kStepBits bits too many, and one for halves.
  const vi zeros = _mm512_add_epi16(_mm512_and_si512(both, _mm512_set1_epi16(256 - (1 << kStepBits))), _mm512_set1_epi16(128));
  offsets = _mm512_srli_epi16(_mm512_mullo_epi16(steps, zeros), kStepBits + 1);
}

// kMr rows by a panel, over all columns. Not inline: of several of these in one function GCC keeps sums on the stack.
template <int kBits, int kMr>
__attribute__((noinline)) void codes_tile(const QuantWeights& w, int64_t panel, SignedRows a, bool next_is_own, int32_t* sums) {
  constexpr int kNr = kGroupsAtOnce;
  const int64_t runs = w.depth / kCodeRun, group = runs * kBits * 64, step_group = runs * kGroupRows;
  const vi lower = _mm512_set1_epi8((1 << kBits) - 1), upper = _mm512_slli_epi16(lower, 4);
  const vi twice[2] = {_mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 0, 1, 4, 5, 4, 5, 8, 9, 8, 9, 12, 13, 12, 13)),
                       _mm512_broadcast_i32x4(_mm_setr_epi8(2, 3, 2, 3, 6, 7, 6, 7, 10, 11, 10, 11, 14, 15, 14, 15))};
  const uint8_t* ahead = w.codes + (panel + 1) * kPanelGroups * group;
  for (int g = 0; g < kPanelGroups; g += kNr) {
    const uint8_t* codes = w.codes + (panel * kPanelGroups + g) * group;
    const uint8_t* packed = w.steps + (panel * kPanelGroups + g) * step_group;
    const int8_t* x = a.codes;
    const int32_t* less = a.less;
    vi sum[kNr][kMr];
#pragma GCC unroll 2
    for (int n = 0; n < kNr; ++n)
#pragma GCC unroll 4
      for (int m = 0; m < kMr; ++m) sum[n][m] = _mm512_setzero_si512();
    for (int64_t k = 0; k < w.depth; k += kCodeColumns, packed += 2 * kGroupRows, x += kMr * kCodeColumns, less += kMr) {
      if (next_is_own)
        for (int i = 0; i < 2 * kNr * kBits; ++i, ahead += 64) __builtin_prefetch(ahead, 0, 2);
      vi steps[kNr];
#pragma GCC unroll 2
      for (int n = 0; n < kNr; ++n) {
        vi offsets;
        read_steps<kBits>(packed + n * step_group, steps[n], offsets);
#pragma GCC unroll 4
        for (int m = 0; m < kMr; ++m) dot2(sum[n][m], offsets, _mm512_set1_epi32(less[m]));
      }
#pragma GCC unroll 2
      for (int run = 0; run < 2; ++run, codes += kBits * 64) {
        vi low[kNr][kMr], high[kNr][kMr];
#pragma GCC unroll 2
        for (int n = 0; n < kNr; ++n)
#pragma GCC unroll 4
          for (int m = 0; m < kMr; ++m) low[n][m] = high[n][m] = _mm512_setzero_si512();
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          vi two[kNr];
#pragma GCC unroll 2
          for (int n = 0; n < kNr; ++n) two[n] = nibbles<kBits>(codes + n * group, j);
#pragma GCC unroll 4
          for (int m = 0; m < kMr; ++m) {
            int32_t four[2];
            __builtin_memcpy(&four[0], x + m * kCodeColumns + run * kCodeRun + j * 4, 4);
            __builtin_memcpy(&four[1], x + m * kCodeColumns + run * kCodeRun + j * 4 + 16, 4);
#pragma GCC unroll 2
            for (int n = 0; n < kNr; ++n) {
              dot4(low[n][m], _mm512_and_si512(two[n], lower), _mm512_set1_epi32(four[0]));
              dot4(high[n][m], _mm512_and_si512(two[n], upper), _mm512_set1_epi32(four[1]));
            }
          }
        }
#pragma GCC unroll 2
        for (int n = 0; n < kNr; ++n) {
          const vi step = _mm512_shuffle_epi8(steps[n], twice[run]);
#pragma GCC unroll 4
          for (int m = 0; m < kMr; ++m)  // 16 times the upper sum, 12 bits up, with the lower beside it
            dot2(sum[n][m], _mm512_mask_mov_epi16(_mm512_slli_epi32(high[n][m], 12), 0x55555555, low[n][m]), step);
        }
      }
    }
#pragma GCC unroll 2
    for (int n = 0; n < kNr; ++n)
#pragma GCC unroll 4
      for (int m = 0; m < kMr; ++m) _mm512_store_si512(sums + m * kPanelRows + (g + n) * kGroupRows, sum[n][m]);
  }
}

template <int kBits>
inline void codes_panel(const QuantWeights& w, int64_t panel, SignedRows a, bool next_is_own, int32_t* sums) {
  switch (a.rows) {
    case 1: return codes_tile<kBits, 1>(w, panel, a, next_is_own, sums);
    case 2: return codes_tile<kBits, 2>(w, panel, a, next_is_own, sums);
    case 3: return codes_tile<kBits, 3>(w, panel, a, next_is_own, sums);
    default: return codes_tile<kBits, 4>(w, panel, a, next_is_own, sums);
  }
}

// `scratch`: of an unpacked panel, from a multiple of 64 bytes on.
inline void codes_gemm(const QuantLinear& op, int64_t panel, int64_t first, int64_t rows, bool next_is_own, int8_t* scratch,
                       int32_t* sums) {
  const QuantWeights& w = op.weights;
  const SignedRows a{scratch, reinterpret_cast<int32_t*>(scratch + rows * w.depth), rows, w.depth};
  for (int64_t m = 0; m < rows; ++m) sign_row(CodeRow(op, first + m), m, a);
  if (w.bits == 4) codes_panel<4>(w, panel, a, next_is_own, sums);
  if (w.bits == 3) codes_panel<3>(w, panel, a, next_is_own, sums);
  if (w.bits == 2) codes_panel<2>(w, panel, a, next_is_own, sums);
}
