// Codes of 4, 3 and 2 bits to the int8 values that the products take: value = step * code - offset.
//
// In a group of 16 rows, 32 columns are 8 vectors of 16 rows x 4 columns, two, four or eight of which share a vector of memory, each in
// its own bits of every byte: unpacking is a shift and an and. 3 bits are the vectors of 2 bits and one vector more of upper bits. Step
// times code fits in a byte, so one 16-bit multiplication does two of them. GCC splits these 64-byte vectors on narrower ISAs, whose ABI
// could not return them.

typedef uint8_t bytes64 __attribute__((vector_size(64), may_alias));
typedef uint16_t words32 __attribute__((vector_size(64), aligned(1), may_alias));
typedef uint32_t dwords16 __attribute__((vector_size(64)));
typedef uint8_t bytes16 __attribute__((vector_size(16), aligned(1), may_alias));

// Step and offset of 16 rows, in every 16 bits of the row's 32.
struct Steps {
  words32 step, offset;
};

template <int kBits>
inline void read_steps(const uint8_t* packed, Steps& steps) {
#if defined(__AVX512F__)  // GCC 12 widens byte by byte
  const dwords16 both = reinterpret_cast<dwords16>(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed))));
#else
  const dwords16 both = __builtin_convertvector(*reinterpret_cast<const bytes16*>(packed), dwords16);
#endif
  const dwords16 step = both & ((1u << (8 - kBits)) - 1), zero = (both >> (8 - kBits)) + (1u << (kBits - 1));
  steps.step = reinterpret_cast<words32>(step | step << 16);
  steps.offset = steps.step * reinterpret_cast<words32>(zero | zero << 16) >> 1;
}

// The codes of vector j of 8.
template <int kBits>
inline void read_codes(const uint8_t* packed, int j, words32& codes) {
  const words32* words = reinterpret_cast<const words32*>(packed);
  if (kBits == 4) codes = words[j % 4] >> (j / 4 * 4) & 0x0f0f;
  if (kBits < 4) codes = words[j % 2] >> (j / 2 * 2) & 0x0303;
  if (kBits == 3) codes |= (j < 2 ? words[2] << ((2 - j) & 3) : words[2] >> ((j - 2) & 7)) & 0x0404;
}

// `columns`, a multiple of 32, of a group: [k / 4][16 rows][4 columns] of values.
template <int kBits>
inline void unpack(const uint8_t* codes, const uint8_t* steps, int64_t columns, int8_t* values) {
  for (int64_t k = 0; k < columns; k += kCodeRun, codes += kBits * 64, steps += kGroupRows, values += kCodeRun * kGroupRows) {
    Steps s;
    read_steps<kBits>(steps, s);
    const bytes64 offset = reinterpret_cast<bytes64>(s.offset | s.offset << 8);
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      words32 code;
      read_codes<kBits>(codes, j, code);
      // Step times code is at most 225: no carry into the other byte.
      const bytes64 value = reinterpret_cast<bytes64>(code * s.step) - offset;
      __builtin_memcpy(values + j * 64, &value, 64);
    }
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
