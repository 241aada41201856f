// Up to kCodesRows rows times codes of 4, 3 and 2 bits on AVX-512: 64 codes become int8 values in a register and are multiplied there, so
// that nothing is stored. Beside so few products unpacking is most of the work (see quant_unpack.inl).

constexpr int64_t kCodesRows = 3;

// Rows of activations: `row` bytes apart, and 64 columns of one `next` bytes on from the 64 before.
struct CodeRows {
  const uint8_t* first;
  int64_t row, next;
};

// kMr rows by a panel, over all columns, with the groups side by side: one row's sums of one group would wait for each other. Not inline:
// of several of these in one function GCC keeps sums on the stack.
template <int kBits, int kMr>
__attribute__((noinline)) void codes_tile(const QuantWeights& w, int64_t panel, CodeRows a, bool next_is_own, int32_t* sums) {
  const int64_t runs = w.depth / kCodeRun;
  const uint8_t* codes = w.codes + panel * kPanelGroups * runs * kBits * 64;
  const uint8_t* steps = w.steps + panel * kPanelGroups * runs * kGroupRows;
  vi sum[kMr][kPanelGroups];
#pragma GCC unroll 4
  for (int n = 0; n < kPanelGroups; ++n) {
    const vi start = _mm512_loadu_si512(w.starts + (panel * kPanelGroups + n) * kGroupRows);
#pragma GCC unroll 3
    for (int m = 0; m < kMr; ++m) sum[m][n] = start;
  }
  const uint8_t* ahead = codes + kPanelGroups * runs * kBits * 64;
  for (int64_t run = 0; run < runs; ++run, codes += kBits * 64, steps += kGroupRows) {
    if (next_is_own)
      for (int i = 0; i < kPanelGroups * kBits; ++i, ahead += 64) __builtin_prefetch(ahead, 0, 2);
    const uint8_t* first = a.first + run / 2 * a.next + run % 2 * kCodeRun;
    RunSteps<kBits> of_run[kPanelGroups];
#pragma GCC unroll 4
    for (int n = 0; n < kPanelGroups; ++n) of_run[n].read(steps + n * runs * kGroupRows);
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      vi b[kPanelGroups];
#pragma GCC unroll 4
      for (int n = 0; n < kPanelGroups; ++n) b[n] = of_run[n].values(codes + n * runs * kBits * 64, j);
#pragma GCC unroll 3
      for (int m = 0; m < kMr; ++m) {
        int32_t four;
        __builtin_memcpy(&four, first + m * a.row + j * 4, 4);
        const vi row = _mm512_set1_epi32(four);
#pragma GCC unroll 4
        for (int n = 0; n < kPanelGroups; ++n) dot4(sum[m][n], row, b[n]);
      }
    }
  }
#pragma GCC unroll 3
  for (int m = 0; m < kMr; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < kPanelGroups; ++n) _mm512_store_si512(sums + m * kPanelRows + n * kGroupRows, sum[m][n]);
}

template <int kBits>
inline void codes_panel(const QuantWeights& w, int64_t panel, int64_t rows, CodeRows a, bool next_is_own, int32_t* sums) {
  switch (rows) {
    case 1: return codes_tile<kBits, 1>(w, panel, a, next_is_own, sums);
    case 2: return codes_tile<kBits, 2>(w, panel, a, next_is_own, sums);
    default: return codes_tile<kBits, 3>(w, panel, a, next_is_own, sums);
  }
}

inline void codes_gemm(const QuantWeights& w, int64_t panel, int64_t rows, CodeRows a, bool next_is_own, int32_t* sums) {
  if (w.bits == 4) codes_panel<4>(w, panel, rows, a, next_is_own, sums);
  if (w.bits == 3) codes_panel<3>(w, panel, rows, a, next_is_own, sums);
  if (w.bits == 2) codes_panel<2>(w, panel, rows, a, next_is_own, sums);
}
