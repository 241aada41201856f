// Codes of 4, 3 and 2 bits to the int8 values that the products take: value = step * code - offset.
//
// In a group of 16 rows, 32 columns are 8 vectors of 16 rows x 4 columns, two, four or eight of which share a vector of memory, each in
// its own bits of every byte: unpacking is a shift and an and. 3 bits are the vectors of 2 bits and one vector more of upper bits. Step
// times code fits in a byte, so one 16-bit multiplication does two of them. GCC splits these 64-byte vectors on narrower ISAs, whose ABI
// could not return them.
//
// AVX-512 needs fewer instructions. 4 bits: the upper code of a byte is not shifted, the upper half of its product with 2^12 steps is
// taken. 2 bits: 128 bits hold 4 rows, whose 4 values each make a table of 16 bytes for vpshufb: the index is a code beside the row's
// number. In a table with the two exchanged that is a code in bits 2 and 3, so that only the upper half of a byte is shifted. 3 bits: the
// same, and the upper bits are masks under which 4 steps are added.

#if defined(__AVX512F__)

constexpr int kAllBytes = 0x01010101;

// What a run of 32 columns needs of its steps, in each row's 4 bytes.
template <int kBits>
struct RunSteps {
  vi step, upper_step, offset;  // 4 bits: steps and 2^12 of them in 16 bits, offsets in 8
  vi table[2], four_steps;      // below: values by row and code, by code and row; 4 steps in 8 bits

  // `packed`: a byte for each of 16 rows, step | zero << kStepBits.
  void read(const uint8_t* packed) {
    constexpr int kStepBits = 8 - kBits;
    const vi row = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const vi spread = _mm512_mullo_epi32(row, _mm512_set1_epi32(kAllBytes));
    const vi exchanged = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const vi both = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed))), spread);
    step = _mm512_and_si512(both, _mm512_set1_epi16((1 << kStepBits) - 1));
    // In its place, with 2^(kBits - 1) beside it: the product has kStepBits bits too many, and one for halves.
    const vi zero = _mm512_add_epi16(_mm512_and_si512(both, _mm512_set1_epi16(256 - (1 << kStepBits))), _mm512_set1_epi16(128));
    const vi words = _mm512_srli_epi16(_mm512_mullo_epi16(step, zero), kStepBits + 1);
    offset = _mm512_or_si512(words, _mm512_slli_epi16(words, 8));
    if constexpr (kBits == 4) {
      upper_step = _mm512_slli_epi16(step, 12);
    } else {
      table[0] = _mm512_sub_epi8(_mm512_mullo_epi16(step, _mm512_set1_epi32(0x03020100)), offset);
      table[1] = _mm512_shuffle_epi8(table[0], exchanged);
      if constexpr (kBits == 3) four_steps = _mm512_mullo_epi16(step, _mm512_set1_epi16(0x0404));
    }
  }

  // Vector j of 8.
  vi values(const uint8_t* codes, int j) const {
    const auto load = [codes](int i) { return _mm512_loadu_si512(codes + i * 64); };
    if constexpr (kBits == 4) {
      const vi low = _mm512_set1_epi8(0x0f), two = load(j % 4);
      return _mm512_sub_epi8(j < 4 ? _mm512_mullo_epi16(_mm512_and_si512(two, low), step)
                                   : _mm512_mulhi_epu16(_mm512_andnot_si512(low, two), upper_step),
                             offset);
    } else {
      constexpr int kAndOr = 0xea;  // code & mask | row
      const int odd = j / 2 % 2;    // codes in bits 2 and 3
      const int rows = odd ? kAllBytes : 4 * kAllBytes;
      const vi row = _mm512_broadcast_i32x4(_mm_setr_epi32(0, rows, 2 * rows, 3 * rows));
      const vi four = load(j % 2), here = j < 4 ? four : _mm512_srli_epi16(four, 4);
      const vi value = _mm512_shuffle_epi8(table[odd], _mm512_ternarylogic_epi32(here, _mm512_set1_epi8(odd ? 12 : 3), row, kAndOr));
      if constexpr (kBits == 2) return value;
      const __mmask64 upper = _mm512_test_epi8_mask(load(2), _mm512_set1_epi8(static_cast<char>(1 << j)));
      return _mm512_mask_add_epi8(value, upper, value, four_steps);
    }
  }

  void unpack(const uint8_t* codes, int j, int8_t* to) const { _mm512_storeu_si512(to, values(codes, j)); }
};

#else

typedef uint8_t bytes64 __attribute__((vector_size(64), may_alias));
typedef uint16_t words32 __attribute__((vector_size(64), aligned(1), may_alias));
typedef uint32_t dwords16 __attribute__((vector_size(64)));
typedef uint8_t bytes16 __attribute__((vector_size(16), aligned(1), may_alias));

// What a run of 32 columns needs of its steps.
template <int kBits>
struct RunSteps {
  words32 step, offset;  // in every 16 bits of the row's 32; in every byte

  // `packed`: a byte for each of 16 rows, step | zero << (8 - kBits).
  void read(const uint8_t* packed) {
    const dwords16 both = __builtin_convertvector(*reinterpret_cast<const bytes16*>(packed), dwords16);
    const dwords16 one = both & ((1u << (8 - kBits)) - 1), zero = (both >> (8 - kBits)) + (1u << (kBits - 1));
    step = reinterpret_cast<words32>(one | one << 16);
    offset = step * reinterpret_cast<words32>(zero | zero << 16) >> 1;
    offset |= offset << 8;
  }

  // Vector j of 8. Step times code is at most 225: no carry into the other byte.
  void unpack(const uint8_t* codes, int j, int8_t* values) const {
    const words32* words = reinterpret_cast<const words32*>(codes);
    words32 code;
    if (kBits == 4) code = words[j % 4] >> (j / 4 * 4) & 0x0f0f;
    if (kBits < 4) code = words[j % 2] >> (j / 2 * 2) & 0x0303;
    if (kBits == 3) code |= (j < 2 ? words[2] << ((2 - j) & 3) : words[2] >> ((j - 2) & 7)) & 0x0404;
    const bytes64 value = reinterpret_cast<bytes64>(code * step) - reinterpret_cast<bytes64>(offset);
    __builtin_memcpy(values, &value, 64);
  }
};

#endif

// `columns`, a multiple of 32, of a group: [k / 4][16 rows][4 columns] of values.
template <int kBits>
inline void unpack(const uint8_t* codes, const uint8_t* steps, int64_t columns, int8_t* values) {
  for (int64_t k = 0; k < columns; k += kCodeRun, codes += kBits * 64, steps += kGroupRows, values += kCodeRun * kGroupRows) {
    RunSteps<kBits> run;
    run.read(steps);
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) run.unpack(codes, j, values + j * 64);
  }
}

// Values of a panel: group g's from values + g * group on.
struct PanelValues {
  const int8_t* values;
  int64_t group;
};

inline int64_t code_run(const QuantWeights& w, int64_t panel, int64_t group, int64_t first) {
  return ((panel * kPanelGroups + group) * w.depth + first) / kCodeRun;
}

// The values of a part of a panel, `columns` from column `first` on. 8 bits need no unpacking.
inline PanelValues panel_values(const QuantWeights& w, int64_t panel, int64_t first, int64_t columns, int8_t* scratch) {
  if (w.bits == 8)
    return {reinterpret_cast<const int8_t*>(w.codes) + panel * w.depth * kPanelRows + first * kGroupRows, w.depth * kGroupRows};
  for (int64_t g = 0; g < kPanelGroups; ++g) {
    const int64_t run = code_run(w, panel, g, first);
    const uint8_t* codes = w.codes + run * w.bits * 64;
    const uint8_t* steps = w.steps + run * kGroupRows;
    int8_t* to = scratch + g * columns * kGroupRows;
    if (w.bits == 4) unpack<4>(codes, steps, columns, to);
    if (w.bits == 3) unpack<3>(codes, steps, columns, to);
    if (w.bits == 2) unpack<2>(codes, steps, columns, to);
  }
  return {scratch, columns * kGroupRows};
}
