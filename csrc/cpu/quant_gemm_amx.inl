// Integer products on AMX tiles: tdpbusd multiplies 16 rows by 64 columns of activations with 64 columns by 16 output features in 16
// cycles, four times the rate of two vpdpbusd a cycle. Activations lie in tiles (quant_rows.inl), and so do groups of weights.
//
// 2 x 2 tiles of sums stay in registers over all columns, in two halves of a panel; loading two tiles of each operand for four products
// takes as long as half of them. Up to 16 rows have four tiles of sums side by side, so that weights are read once and in order. Sums start
// from a tile whose rows are all the same line: a stride of 0.

constexpr bool kTakesPacked = false;
constexpr int64_t kTileRows = 32;

inline int64_t tile_rows(const QuantWeights& w, int64_t left) {
  return tiled(w) ? (left < kTileRows ? left : kTileRows) : equal_parts(left, kVnniRows);
}

// tile(k, n): where the values of columns [k, k + 64) of group n lie, asked for in order and two tiles before they are multiplied.
template <typename F>
inline void sixteen_rows(int64_t columns, const uint8_t* a, const F& tile, const int32_t* starts, int32_t* sums) {
  _tile_loadd(0, starts, 0);
  _tile_loadd(1, starts + 16, 0);
  _tile_loadd(2, starts + 32, 0);
  _tile_loadd(3, starts + 48, 0);
  const int8_t *even = tile(0, 0), *odd = tile(0, 1);
  const auto fence = [] { asm volatile("" ::: "memory"); };  // _tile_loadd does not tell the compiler that it reads what was unpacked
  for (int64_t k = 0; k < columns; k += 64) {
    const int64_t next = k + 64 < columns ? k + 64 : k;  // the last two are not used
    fence();
    _tile_loadd(4, a + k * 16, 64);
    _tile_loadd(5, even, 64);
    _tile_dpbusd(0, 4, 5);
    even = tile(k, 2);
    fence();
    _tile_loadd(6, odd, 64);
    _tile_dpbusd(1, 4, 6);
    odd = tile(k, 3);
    fence();
    _tile_loadd(7, even, 64);
    _tile_dpbusd(2, 4, 7);
    even = tile(next, 0);
    fence();
    _tile_loadd(5, odd, 64);
    _tile_dpbusd(3, 4, 5);
    odd = tile(next, 1);
  }
  _tile_stored(0, sums, kPanelRows * 4);
  _tile_stored(1, sums + 16, kPanelRows * 4);
  _tile_stored(2, sums + 32, kPanelRows * 4);
  _tile_stored(3, sums + 48, kPanelRows * 4);
}

// 32 rows by two groups. The second 16 rows of activations are `next` bytes on, rows of sums `row` numbers apart. beside() is called with
// every 64 columns: tiles take so few instructions that the epilogue of other sums runs in their shadow.
template <typename F>
inline void four_tiles(int64_t columns, const uint8_t* a, int64_t next, PanelValues b, const int32_t* starts, int32_t* sums, int64_t row,
                       const F& beside) {
  _tile_loadd(0, starts, 0);
  _tile_loadd(1, starts + 16, 0);
  _tile_loadd(2, starts, 0);
  _tile_loadd(3, starts + 16, 0);
  for (int64_t k = 0; k < columns * 16; k += 1024) {
    _tile_loadd(4, a + k, 64);
    _tile_loadd(6, b.values + k, 64);
    _tile_loadd(5, a + k + next, 64);
    _tile_loadd(7, b.values + b.group + k, 64);
    _tile_dpbusd(0, 4, 6);
    _tile_dpbusd(2, 5, 6);
    _tile_dpbusd(1, 4, 7);
    _tile_dpbusd(3, 5, 7);
    beside();
  }
  _tile_stored(0, sums, row * 4);
  _tile_stored(1, sums + 16, row * 4);
  _tile_stored(2, sums + 16 * row, row * 4);
  _tile_stored(3, sums + 16 * row + 16, row * 4);
}

inline void integer_tiles(const QuantWeights& w, int64_t, int64_t, int64_t rows, int64_t columns, const uint8_t* a, PanelValues b,
                          Ahead ahead, const int32_t* starts, int64_t start_row, int32_t* sums) {
  if (!tiled(w)) return vnni_tiles(rows, columns, a, w.depth, b, ahead, starts, start_row, sums);
  const TileScope scope;
  const auto tile = [&](int64_t k, int64_t n) { return b.values + n * b.group + k * kGroupRows; };
  if (rows <= 16) return sixteen_rows(columns, a, tile, starts, sums);
  const auto nothing = [] {};
  four_tiles(columns, a, 16 * w.depth, b, starts, sums, kPanelRows, nothing);
  four_tiles(columns, a, 16 * w.depth, {b.values + 2 * b.group, b.group}, starts + 32, sums + 32, kPanelRows, nothing);
}

constexpr int64_t kFewRows = 16;
constexpr int64_t kVnniFewRows = 4;  // of 8 bits: as many or fewer are faster without tiles, whose loads take as long for one row as for 16

inline bool takes_few_rows(const QuantWeights& w, int64_t rows) {
  return w.bits < 8 ? rows <= kFewRows : rows <= kVnniFewRows && w.segments == 1;
}

template <int kBits>
inline void few_rows(const QuantLinear& op, int64_t panel, int64_t first, bool next_is_own, int8_t* values, int32_t* sums) {
  const QuantWeights& w = op.weights;
  const int64_t next_panel = w.depth * kPanelRows * kBits / 8;
  const auto tile = [&](int64_t k, int64_t n) {
    const int64_t run = code_run(w, panel, n, k);
    const uint8_t* codes = w.codes + run * kBits * 64;
    if (next_is_own)
      for (int i = 0; i < 2 * kBits; ++i) __builtin_prefetch(codes + next_panel + i * 64, 0, 2);
    int8_t* to = values + (k / 16 + n) % 4 * 1024;
    unpack<kBits>(codes, w.steps + run * kGroupRows, kCodeColumns, to);
    return to;
  };
  const TileScope scope;
  sixteen_rows(w.depth, op.a + first * w.depth, tile, w.starts + panel * kPanelRows, sums);
}

// Rows times 8 bits without tiles; `scratch` takes the rows end to end.
inline void vnni_rows(const QuantLinear& op, int64_t panel, int64_t first, int64_t rows, bool next_is_own, int8_t* scratch, int32_t* sums) {
  const QuantWeights& w = op.weights;
  uint8_t* a = reinterpret_cast<uint8_t*>(scratch);
  for (int64_t m = 0; m < rows; ++m) {
    const CodeRow from(op, first + m);
    for (int64_t k = 0; k < w.depth; k += kCodeColumns) __builtin_memcpy(a + m * w.depth + k, from.at(k), kCodeColumns);
  }
  const PanelValues values = panel_values(w, panel, 0, w.depth, nullptr);
  const Ahead ahead{w.codes + (panel + 1) * w.depth * kPanelRows, next_is_own ? 8 * kPanelRows : 0, static_cast<char*>(op.out), 0};
  vnni_tiles(rows, w.depth, a, w.depth, values, ahead, w.starts + panel * kPanelRows, 0, sums);
}

// A block of few rows. More than kCodesRows of them times low bits: two tiles of values, of 1 KB, are unpacked while the ones before are
// multiplied, into a ring of four: loads wait for earlier stores at the same place in another 4 KB.
inline void few_rows(const QuantLinear& op, int64_t panel, int64_t first, int64_t rows, bool next_is_own, int8_t* values, int32_t* sums) {
  const int bits = op.weights.bits;
  if (bits == 8) return vnni_rows(op, panel, first, rows, next_is_own, values, sums);
  if (rows <= kCodesRows) return codes_gemm(op, panel, first, rows, next_is_own, values, sums);
  if (bits == 4) few_rows<4>(op, panel, first, next_is_own, values, sums);
  if (bits == 3) few_rows<3>(op, panel, first, next_is_own, values, sums);
  if (bits == 2) few_rows<2>(op, panel, first, next_is_own, values, sums);
}
