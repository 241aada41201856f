// quant_linear: y = activation(x W^T + bias) + residual with W of 8 to 2 bits.
//
// An item is a panel of 64 output features times a block of rows, taken kTileRows rows at a time over all columns. With 8-bit activations
// the sums are int32 and exact; they start from what the +128 of the stored activations adds too much, so taking that off costs nothing.
// Scales, bias, activation and residual are applied to a tile while it is in the first-level cache. What else an encoder does to a row
// (LayerNorm, codes for the next layer) needs all its panels and comes behind.

struct QuantBlock {
  int64_t panel, first, rows, columns;  // rows of x from `first` on; columns of the output
};

inline QuantBlock quant_block(const QuantLinear& op, int64_t item) {
  const int64_t size = quant_row_block(op);
  const int64_t panel = item % op.weights.panels, first = item / op.weights.panels * size;
  const int64_t left = op.weights.rows - panel * kPanelRows;
  return {panel, first, op.rows - first < size ? op.rows - first : size, left < kPanelRows ? left : kPanelRows};
}

// The table of core/gelu_curve.h, one coefficient of a vector of pieces at a time. Registers hold all of it where it fits, since memory
// might be what an output is written to, and read again for each.
struct GeluCurve {
#if defined(__AVX512F__)
  vf half[8];
  explicit GeluCurve(const float* curve) {
    for (int i = 0; i < 8; ++i) half[i] = load(curve + i * 16);
  }
  vf operator()(int power, vi32 piece) const {
    return _mm512_permutex2var_ps(half[2 * power], reinterpret_cast<vi>(piece), half[2 * power + 1]);
  }
#else
  const float* curve;
  explicit GeluCurve(const float* curve) : curve(curve) {}
  vf operator()(int power, vi32 piece) const {
    const float* table = curve + power * kGeluPieces;
#if defined(__AVX2__)
    return _mm256_i32gather_ps(table, _mm256_and_si256(reinterpret_cast<vi>(piece), _mm256_set1_epi32(kGeluPieces - 1)), 4);
#else
    vf out;
    for (int i = 0; i < W; ++i) out[i] = table[piece[i] & (kGeluPieces - 1)];
    return out;
#endif
  }
#endif
};

// h + |h| T(|h|) of h = x / 2, see core/gelu_curve.h. A NaN takes some piece of the table and stays NaN.
inline vf gelu_of_half(vf h, const GeluCurve& curve) {
  const vf magic = set1(8388608.0f), last = set1((kGeluPieces - 1) * kGeluStep), per_piece = set1(1 / kGeluStep);  // magic: 2^23
  const vf whole = vabs(h), size = vmin(last, whole);
  const vi32 piece = reinterpret_cast<vi32>(fma(size, per_piece, magic));  // in the lowest bits
  vf p = curve(3, piece);
  for (int power = 2; power >= 0; --power) p = fma(p, size, curve(power, piece));
  return fma(whole, p, h);
}

// e = exp(-2 |x|) - 1 keeps tanh = -e / (2 + e) exact near 0.
inline vf tanh(vf x) {
  const vf e = expm1(vabs(x) * -2.0f);
  const vi32 sign = reinterpret_cast<vi32>(x) & static_cast<int32_t>(0x80000000);
  return reinterpret_cast<vf>(reinterpret_cast<vi32>(-e / (e + 2.0f)) ^ sign);
}

// What Activate takes, as a share of x: scales and bias give it as easily as x.
constexpr float activation_input(Activation activation) {
  return activation == Activation::kGelu || activation == Activation::kGeluTanh ? 0.5f : 1.0f;
}

template <Activation kActivation>
struct Activate {
  explicit Activate(const float* /*curve*/) {}
  vf operator()(vf x) const {
    switch (kActivation) {
      case Activation::kRelu: return vmax(set1(0.0f), x);
      case Activation::kTanh: return tanh(x);
      default: return x;
    }
  }
};

template <>
struct Activate<Activation::kGelu> {
  GeluCurve curve;
  explicit Activate(const float* curve) : curve(curve) {}
  vf operator()(vf h) const { return gelu_of_half(h, curve); }
};

// What finish_row reads of a block's sums: 16 lanes or fewer of row m, from column n on.
struct FloatSums {
  const float* sums;
  vf operator()(int64_t m, int64_t n) const { return load(sums + m * kPanelRows + n); }
};

// int32 sums of a segment without the weights' zeros, times their scales.
struct IntegerSums {
  const int32_t* sums;
  const float* scales;
  const int32_t* zeros;   // of the panel
  const int32_t* a_sums;  // of the block's first row; null: no zeros
  int64_t segments;

  IntegerSums(const QuantLinear& op, const QuantBlock& block, int64_t segment, const int32_t* sums) : sums(sums) {
    const int64_t at = (segment * op.weights.panels + block.panel) * kPanelRows;
    segments = op.weights.segments;
    scales = op.weights.scales + at;
    zeros = op.a_sums ? op.weights.zeros + at : nullptr;
    a_sums = op.a_sums ? op.a_sums + block.first * segments + segment : nullptr;
  }

  vf operator()(int64_t m, int64_t n) const {
    vi32 sum;
    __builtin_memcpy(&sum, sums + m * kPanelRows + n, sizeof(sum));
    if (a_sums) {
      vi32 zero;
      __builtin_memcpy(&zero, zeros + n, sizeof(zero));
      sum -= zero * a_sums[m * segments];
    }
    return __builtin_convertvector(sum, vf) * load(scales + n);
  }
};

// A row's 64 columns of a panel, times `scale`, to the output. `bias`: of panel_bias.
template <Activation kActivation, typename Sums>
inline void finish_row(const QuantLinear& op, const QuantBlock& block, int64_t m, const Sums& sums, float scale, const float* bias,
                       const Activate<kActivation>& activate) {
  const int64_t row = block.first + m, at = row * op.weights.rows + block.panel * kPanelRows;
  alignas(64) float result[kPanelRows], other[kPanelRows];
  const bool direct = op.out_dtype == DType::kF32 && block.columns == kPanelRows;
  float* out = direct ? static_cast<float*>(op.out) + at : result;
  const float* residual = nullptr;
  if (op.residual.data) {
    const RowsView& r = op.residual;
    residual = as_floats(r.data, r.dtype, row_offset(r, row) + block.panel * kPanelRows * r.stride_column, r.stride_column, block.columns,
                         other);
    if (block.columns < kPanelRows && residual != other) {
      for (int64_t n = 0; n < block.columns; ++n) other[n] = residual[n];
      residual = other;
    }
    for (int64_t n = block.columns; n < kPanelRows; ++n) other[n] = 0;
  }
  const vf times = set1(scale * activation_input(kActivation));
#pragma GCC unroll 4
  for (int64_t n = 0; n < kPanelRows; n += W) {
    vf y = activate(fma(sums(m, n), times, load(bias + n)));
    if (residual) y += load(residual + n);
    store(out + n, y);
  }
  if (!direct) from_floats(result, block.columns, op.out, op.out_dtype, at);
}

template <Activation kActivation, typename Sums>
inline void finish_rows(const QuantLinear& op, const QuantBlock& block, const Sums& sums, const float* scales, const float* bias) {
  const Activate<kActivation> activate(op.curve);
  for (int64_t m = 0; m < block.rows; ++m)
    finish_row(op, block, m, sums, scales ? scales[block.first + m] : 1.0f, bias, activate);
}

inline void put(float* p, vf x) { store(p, x); }
inline void put(uint16_t* p, vf x) {
#if defined(__AVX512BF16__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
#else
  store_bf16(p, x);
#endif
}

// The same where nothing is in the way: kColumns of float32 or bf16, with neither residual nor zeros. `column`: the first, of the output.
template <int64_t kColumns, Activation kActivation>
inline void finish_plain_row(const QuantLinear& op, int64_t row, int64_t column, const int32_t* sums, const float* bias,
                             const Activate<kActivation>& activate) {
  const int64_t at = row * op.weights.rows + column;
  const vf times = set1(op.a_scale[row] * activation_input(kActivation));
  const auto finish = [&](auto* out) {
#pragma GCC unroll 4
    for (int64_t n = 0; n < kColumns; n += W) {
      vi32 sum;
      __builtin_memcpy(&sum, sums + n, sizeof(sum));
      const vf scaled = __builtin_convertvector(sum, vf) * load(op.weights.scales + column + n);
      put(out + n, activate(fma(scaled, times, load(bias + n))));
    }
  };
  op.out_dtype == DType::kF32 ? finish(static_cast<float*>(op.out) + at) : finish(static_cast<uint16_t*>(op.out) + at);
}

template <Activation kActivation>
inline void finish_plain_rows(const QuantLinear& op, const QuantBlock& block, const int32_t* sums, const float* bias) {
  const Activate<kActivation> activate(op.curve);
  for (int64_t m = 0; m < block.rows; ++m)
    finish_plain_row<kPanelRows>(op, block.first + m, block.panel * kPanelRows, sums + m * kPanelRows, bias, activate);
}

// `bias`: of panel_bias.
template <typename Sums>
inline void finish(const QuantLinear& op, const QuantBlock& block, const Sums& sums, const float* scales, const float* bias) {
  switch (op.activation) {
    case Activation::kNone: return finish_rows<Activation::kNone>(op, block, sums, scales, bias);
    case Activation::kRelu: return finish_rows<Activation::kRelu>(op, block, sums, scales, bias);
    case Activation::kTanh: return finish_rows<Activation::kTanh>(op, block, sums, scales, bias);
    default: return finish_rows<Activation::kGelu>(op, block, sums, scales, bias);
  }
}

inline bool plain(const QuantLinear& op, const QuantBlock& block) {
  return op.out_dtype != DType::kF16 && block.columns == kPanelRows && !op.residual.data && !op.a_sums && op.weights.segments == 1;
}

inline void finish_plain(const QuantLinear& op, const QuantBlock& block, const int32_t* sums, const float* bias) {
  switch (op.activation) {
    case Activation::kNone: return finish_plain_rows<Activation::kNone>(op, block, sums, bias);
    case Activation::kRelu: return finish_plain_rows<Activation::kRelu>(op, block, sums, bias);
    case Activation::kTanh: return finish_plain_rows<Activation::kTanh>(op, block, sums, bias);
    default: return finish_plain_rows<Activation::kGelu>(op, block, sums, bias);
  }
}

// The panel's bias, or zeros, as kPanelRows floats, times activation_input.
inline void panel_bias(const QuantLinear& op, const QuantBlock& block, float* bias) {
  for (int64_t n = 0; n < kPanelRows; ++n) bias[n] = 0;
  if (!op.bias) return;
  const float* given = as_floats(op.bias, op.bias_dtype, block.panel * kPanelRows, 1, block.columns, bias);
  for (int64_t n = 0; n < block.columns; ++n) bias[n] = given[n] * activation_input(op.activation);
}

constexpr int64_t kMostRows = kTileRows > kFewRows ? kTileRows : kFewRows;

// Floats of scratch: a tile's sums, their total over segments, and an unpacked panel.
int64_t quant_linear_scratch(const QuantLinear& op) {
  return 2 * kMostRows * kPanelRows + op.weights.depth * (op.weights.bits < 8 ? kPanelRows : kVnniRows) / 4;
}

// Of one segment.
inline void finish_sums(const QuantLinear& op, const QuantBlock& tile, const int32_t* sums, const float* bias) {
  if (plain(op, tile)) return finish_plain(op, tile, sums, bias);
  finish(op, tile, IntegerSums(op, tile, 0, sums), op.a_scale, bias);
}

// A tile's sums over all columns, scaled and added up over segments where there are several.
inline void segment_sums(const QuantLinear& op, const QuantBlock& tile, PanelValues values, const Ahead& ahead, int32_t* sums,
                         float* total) {
  const QuantWeights& w = op.weights;
  for (int64_t segment = 0; segment < w.segments; ++segment) {
    const int64_t k = segment * w.segment, end = segment + 1 == w.segments ? w.depth : k + w.segment;
    const int32_t* starts = w.starts + (segment * w.panels + tile.panel) * kPanelRows;
    const Ahead next{ahead.weights + k / 8 * ahead.weights_step, ahead.weights_step, ahead.out, ahead.out_row};
    integer_tiles(w, tile.panel, k, tile.rows, end - k, CodeRow(op, tile.first).at(k) + k % kCodeColumns,
                  {values.values + k * kGroupRows, values.group}, next, starts, 0, sums);
    if (w.segments == 1) return;
    const IntegerSums scaled(op, tile, segment, sums);
    for (int64_t m = 0; m < tile.rows; ++m)
      for (int64_t n = 0; n < kPanelRows; n += W) {
        float* to = total + m * kPanelRows + n;
        store(to, segment > 0 ? load(to) + scaled(m, n) : scaled(m, n));
      }
  }
}

#if defined(__AMX_INT8__)

// A block on tiles, half a panel of 32 rows at a time, the epilogue of each beside the products of the next. `sums`: of two halves.
template <Activation kActivation>
inline void tiled_block(const QuantLinear& op, const QuantBlock& block, bool next_is_own, PanelValues values, const float* bias,
                        int32_t* sums) {
  constexpr int64_t kHalf = kPanelRows / 2;
  const int64_t depth = op.weights.depth, bytes = op.out_dtype == DType::kF32 ? 4 : 2;
  struct Half {
    int64_t row, rows, n;
    const int32_t* sums;
  } last{};
  const Activate<kActivation> activate(op.curve);
  const auto finish_row = [&] {
    finish_plain_row<kHalf>(op, last.row++, block.panel * kPanelRows + last.n, last.sums, bias + last.n, activate);
    last.sums += kHalf;
    --last.rows;
  };
  // The next panel, into the second-level cache: lines of it beside every 64 columns of the tiles that this one takes.
  const uint8_t* ahead = op.weights.codes + (block.panel + 1) * depth * kPanelRows * op.weights.bits / 8;
  const int64_t lines = next_is_own ? 4 * op.weights.bits / ((block.rows + kTileRows - 1) / kTileRows) : 0;
  const TileScope scope;
  for (int64_t m = 0; m < block.rows; m += kTileRows)
    for (int64_t n = 0; n < kPanelRows; n += kHalf) {
      const int64_t row = block.first + m, left = block.rows - m, share = last.rows;
      const uint8_t* a = op.a + row * depth;
      int64_t due = 0;
      const auto beside = [&] {
        for (int64_t i = 0; i < lines; ++i, ahead += 64) __builtin_prefetch(ahead, 0, 2);
        for (due += share * kCodeColumns; due >= depth; due -= depth) {
          const char* own = static_cast<const char*>(op.out) +
                            ((row + share - last.rows) * op.weights.rows + block.panel * kPanelRows + n) * bytes;
          __builtin_prefetch(own, 1);
          __builtin_prefetch(own + 16 * bytes, 1);
          finish_row();
        }
      };
      four_tiles(depth, a, left > 16 ? 16 * depth : 0, {values.values + n / kGroupRows * values.group, values.group},
                 op.weights.starts + block.panel * kPanelRows + n, sums, kHalf, beside);
      last = {row, left < kTileRows ? left : kTileRows, n, sums};
      sums += n == 0 ? kTileRows * kHalf : -kTileRows * kHalf;
    }
  while (last.rows > 0) finish_row();
}

inline void tiled_block(const QuantLinear& op, const QuantBlock& block, bool next_is_own, PanelValues values, const float* bias,
                        int32_t* sums) {
  switch (op.activation) {
    case Activation::kNone: return tiled_block<Activation::kNone>(op, block, next_is_own, values, bias, sums);
    case Activation::kRelu: return tiled_block<Activation::kRelu>(op, block, next_is_own, values, bias, sums);
    case Activation::kTanh: return tiled_block<Activation::kTanh>(op, block, next_is_own, values, bias, sums);
    default: return tiled_block<Activation::kGelu>(op, block, next_is_own, values, bias, sums);
  }
}

#endif

void quant_linear(const QuantLinear& op, int64_t item, float* scratch) {
  const QuantWeights& w = op.weights;
  const QuantBlock block = quant_block(op, item);
  int32_t* sums = reinterpret_cast<int32_t*>(scratch);
  float* total = scratch + kMostRows * kPanelRows;
  int8_t* unpacked = reinterpret_cast<int8_t*>(total + kMostRows * kPanelRows);
  alignas(64) float bias[kPanelRows];
  panel_bias(op, block, bias);
  const bool next_is_own = op.together > 1 && (item + 1) % op.together != 0;
  if (takes_few_rows(w, block.rows)) {
    few_rows(op, block.panel, block.first, block.rows, next_is_own, unpacked, sums);
    return finish_sums(op, block, sums, bias);
  }
  const PanelValues values = product_values(w, block.panel, 0, w.depth, unpacked);
#if defined(__AMX_INT8__)
  if (tiled(w) && plain(op, block) && block.rows > 16) return tiled_block(op, block, next_is_own, values, bias, sums);
#endif
  const int64_t bytes = op.out_dtype == DType::kF32 ? 4 : 2, tiles = (block.rows + kVnniRows - 1) / kVnniRows;
  Ahead ahead{w.codes + (block.panel + 1) * w.depth * kPanelRows * w.bits / 8, next_is_own ? 8 * kPanelRows * w.bits / 8 / tiles : 0,
              static_cast<char*>(op.out) + (block.first * w.rows + block.panel * kPanelRows) * bytes,
              w.rows * bytes};
  QuantBlock tile = block;
  for (int64_t left = block.rows; left > 0; left -= tile.rows, tile.first += tile.rows) {
    tile.rows = tile_rows(w, left);
    segment_sums(op, tile, values, ahead, sums, total);
    if (w.segments == 1) finish_sums(op, tile, sums, bias);
    else finish(op, tile, FloatSums{total}, op.a_scale, bias);
    ahead.weights += w.depth / 8 * ahead.weights_step;
    ahead.out += tile.rows * ahead.out_row;
  }
}

// Weight-only: the same items with float32 products; weights are unpacked and widened kFloatChunk columns at a time.
constexpr int64_t kFloatChunk = 128;

inline void panel_floats(const QuantWeights& w, int64_t panel, int64_t segment, int64_t first, int64_t columns, int8_t* bytes, float* out) {
  const PanelValues values = panel_values(w, panel, first, columns, bytes);
  const int64_t at = (segment * w.panels + panel) * kPanelRows;
  for (int64_t k = 0; k < columns; ++k) {
    const int32_t column_zero = w.zeros ? w.column_zeros[first + k] : 0;
    const int8_t* from = values.values + k / 4 * 4 * kGroupRows + k % 4;
    for (int64_t n = 0; n < kPanelRows; ++n) {
      const int32_t zero = w.zeros ? w.zeros[at + n] * column_zero : 0;
      out[k * kPanelRows + n] = static_cast<float>(from[n / kGroupRows * values.group + n % kGroupRows * 4] - zero) * w.scales[at + n];
    }
  }
}

template <int kMr>
inline void float_tile(int64_t columns, const float* a, int64_t lda, const float* b, float* sums) {
  for (int64_t n = 0; n < kPanelRows; n += 2 * W) {
    vf sum[kMr][2];
    for (int m = 0; m < kMr; ++m)
      for (int j = 0; j < 2; ++j) sum[m][j] = load(sums + m * kPanelRows + n + j * W);
    for (int64_t k = 0; k < columns; ++k) {
      const vf b0 = load(b + k * kPanelRows + n), b1 = load(b + k * kPanelRows + n + W);
#pragma GCC unroll 6
      for (int m = 0; m < kMr; ++m) {
        const vf row = set1(a[m * lda + k]);
        fma_to(sum[m][0], row, b0);
        fma_to(sum[m][1], row, b1);
      }
    }
    for (int m = 0; m < kMr; ++m)
      for (int j = 0; j < 2; ++j) store(sums + m * kPanelRows + n + j * W, sum[m][j]);
  }
}

int64_t quant_linear_float_scratch(const QuantLinear& op) {
  return quant_row_block(op) * (kPanelRows + kFloatChunk) + kFloatChunk * kPanelRows * 5 / 4;
}

void quant_linear_float(const QuantLinear& op, int64_t item, float* scratch) {
  const QuantWeights& w = op.weights;
  const QuantBlock block = quant_block(op, item);
  float* sums = scratch;
  float* x = sums + quant_row_block(op) * kPanelRows;
  float* weights = x + quant_row_block(op) * kFloatChunk;
  int8_t* bytes = reinterpret_cast<int8_t*>(weights + kFloatChunk * kPanelRows);
  for (int64_t i = 0; i < block.rows * kPanelRows; ++i) sums[i] = 0;
  for (int64_t segment = 0; segment < w.segments; ++segment) {
    const int64_t end = segment + 1 == w.segments ? w.columns : (segment + 1) * w.segment;
    for (int64_t k = segment * w.segment; k < end; k += kFloatChunk) {
      const int64_t columns = end - k < kFloatChunk ? end - k : kFloatChunk;
      panel_floats(w, block.panel, segment, k, round_up(columns, kCodeRun), bytes, weights);
      for (int64_t m = 0; m < block.rows; ++m) {
        float* to = x + m * kFloatChunk;
        const float* from = activations(op, block.first + m, k, columns, to);
        if (from != to) __builtin_memcpy(to, from, columns * sizeof(float));
      }
      int64_t m = 0;
      for (; m + 6 <= block.rows; m += 6) float_tile<6>(columns, x + m * kFloatChunk, kFloatChunk, weights, sums + m * kPanelRows);
      for (; m < block.rows; ++m) float_tile<1>(columns, x + m * kFloatChunk, kFloatChunk, weights, sums + m * kPanelRows);
    }
  }
  alignas(64) float bias[kPanelRows];
  panel_bias(op, block, bias);
  finish(op, block, FloatSums{sums}, nullptr, bias);
}
