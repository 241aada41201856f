// Matrix products on AMX tiles: C[M, N] (+)= A[M, K] B[K, N] in fp32, of operands that are split into bf16 parts.
//
//   x = hi + mid + lo, 8 bits each;  A B = sum over i + j < 3 of A_i B_j, added up in fp32
//
// Tiles multiply bf16 at eleven times the rate of fp32 FMAs. A float takes three parts, and the six products that matter leave out
// 2^-22 of it: less than fp32 sums round off. bf16 is one part, fp16 two.
//
// Tiles take denormal numbers for 0, so the last part of a number below 2^-103 is lost, and what is not finite has no parts: its second is
// NaN. tiles_take() tells the former; the latter shows in the result.
//
// A packed operand is made of tiles of 1 KiB: 16 lines (rows of A, columns of B) times 32 steps of K, all parts of a tile together. Within
// 32 steps, k and k + 16 stand beside each other: two vectors of floats become one line by shifts and masks, without a shuffle.

constexpr int64_t kTileLines = 16, kTileDepth = 32, kTileBytes = 1024, kTileParts = 3;
constexpr int64_t kTileBlock = 2 * kTileLines;  // lines that a product takes at once: lines are padded to it, with zeros

struct Tiles {
  char* data;             // [lines / 16][depth / 32][parts] tiles
  int64_t depth, parts;   // depth in tiles

  char* at(int64_t line, int64_t k) const { return data + (line / kTileLines * depth + k / kTileDepth) * parts * kTileBytes; }
};

inline Tiles tiles(float* memory, int64_t depth, int64_t parts) {
  return {reinterpret_cast<char*>(memory), round_up(depth, kTileDepth) / kTileDepth, parts};
}

inline int64_t tiles_floats(int64_t lines, int64_t depth, int64_t parts) {
  const int64_t bytes = round_up(lines, kTileBlock) / kTileLines * (round_up(depth, kTileDepth) / kTileDepth) * parts * kTileBytes;
  return bytes / static_cast<int64_t>(sizeof(float));
}

// Whether the products of a row, or line, whose largest number this is are exact to that number's rounding.
inline bool tiles_hold(float largest) { return largest == 0 || largest >= 0x1p-100f; }

inline bool tiles_take(const float* x, int64_t n) {
  vf largest[4] = {};
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W)
    for (int j = 0; j < 4; ++j) largest[j] = vmax(largest[j], vabs(load(x + i + j * W)));
  for (; i < n; i += W) largest[0] = vmax(largest[0], vabs(load_up_to(x + i, n - i < W ? n - i : W, 0)));
  return tiles_hold(max(vmax(vmax(largest[0], largest[1]), vmax(largest[2], largest[3]))));
}

// Takes the next part off x, in the upper half of its bits. The first is cut off, since rounding up could make a large number infinite.
inline vu32 take_part(vf& x, int64_t part) {
  const vu32 bits = reinterpret_cast<vu32>(x), upper = (part == 0 ? bits : bits + 0x8000) & 0xffff0000u;
  x -= reinterpret_cast<vf>(upper);
  return upper;
}

inline vf load_floats(const float* p) { return load(p); }
inline vf load_floats(const Bf16* p) { return load_bf16(&p->bits); }
inline vf load_floats(const F16* p) { return load_f16(&p->bits); }

template <int kParts, typename T>
inline void split_tile(const T* x, int64_t stride, int64_t beside, float* tile) {
  for (int64_t i = 0; i < kTileLines; ++i) {
    vf a = load_floats(x + i * stride), b = load_floats(x + i * stride + beside);
#pragma GCC unroll 3
    for (int part = 0; part < kParts; ++part) {
      const vu32 low = take_part(a, part), high = take_part(b, part);
      store(tile + part * kTileLines * W + i * W, reinterpret_cast<vf>(low >> 16 | high));
    }
  }
}

// One tile of every part. Line i is x[i * stride, + 16) and, beside it, the same at distance `beside`, which is 16 for an operand whose
// lines are rows of x, and 16 * stride for one whose lines are columns. These come out as B; turned they are A. The other way round
// for rows.
template <typename T>
inline void split_tile(const T* x, int64_t stride, int64_t beside, int64_t parts, char* tile) {
  float* out = reinterpret_cast<float*>(tile);
  if (parts == 3) split_tile<3>(x, stride, beside, out);
  else if (parts == 2) split_tile<2>(x, stride, beside, out);
  else split_tile<1>(x, stride, beside, out);
}

inline void turn_tile(const char* tile, int64_t parts, char* turned) {
  for (int64_t at = 0; at < parts * kTileBytes; at += kTileBytes)
    transpose_square(reinterpret_cast<const float*>(tile + at), W, reinterpret_cast<float*>(turned + at), W);
}

template <bool kTurned, typename T>
inline void pack_tile(const T* x, int64_t stride, int64_t beside, int64_t parts, char* tile) {
  if (!kTurned) return split_tile(x, stride, beside, parts, tile);
  alignas(64) char straight[kTileParts * kTileBytes];
  split_tile(x, stride, beside, parts, straight);
  turn_tile(straight, parts, tile);
}

// Rows [line, line + n) of an operand, from a block x of n rows and `columns` columns: K runs along them. n and columns are padded.
template <bool kTurned, typename T>
inline void pack_rows(const T* x, int64_t stride, int64_t n, int64_t columns, const Tiles& to, int64_t line) {
  for (int64_t i = 0; i < n; i += kTileLines)
    for (int64_t k = 0; k < columns; k += kTileDepth)
      pack_tile<kTurned>(x + i * stride + k, stride, kTileLines, to.parts, to.at(line + i, k));
}

// Steps [k, k + n) of an operand, from a block x of n rows and `columns` columns: its lines are the columns.
template <bool kTurned, typename T>
inline void pack_columns(const T* x, int64_t stride, int64_t n, int64_t columns, const Tiles& to, int64_t k) {
  for (int64_t i = 0; i < n; i += kTileDepth)
    for (int64_t line = 0; line < columns; line += kTileLines)
      pack_tile<kTurned>(x + i * stride + line, stride, kTileLines * stride, to.parts, to.at(line, k + i));
}

// All eight tiles as 16 lines of 64 bytes, for as long as this lives: what a thread leaves configured it would save at every switch.
struct TileScope {
  TileScope() {
    struct alignas(64) {
      uint8_t palette, start_row, reserved[14];
      uint16_t bytes[16];
      uint8_t lines[16];
    } config{};
    config.palette = 1;
    for (int i = 0; i < 8; ++i) {
      config.bytes[i] = 64;
      config.lines[i] = kTileLines;
    }
    _tile_loadconfig(&config);
    asm volatile("" ::: "memory");  // _tile_loadd does not tell the compiler that it reads what was packed
  }
  ~TileScope() { _tile_release(); }
};

// C[rows, columns] = A B, or += where `add`, over `depth` of K from k on; A's lines from `line` on. Everything in whole blocks.
//
// 2 x 2 tiles of C stay in registers: of the other four, two hold a part of A and two a part of B. From one pair of parts to the next only
// one side changes: 14 loads for the six pairs of a float instead of 18.
template <int kPartsA, int kPartsB>
[[gnu::noinline]] void tile_product(const Tiles& a, int64_t line, int64_t rows, const Tiles& b, int64_t columns, int64_t k, int64_t depth,
                                    float* c, int64_t ldc, bool add) {
  const int64_t next_a = a.depth * kPartsA * kTileBytes, next_b = b.depth * kPartsB * kTileBytes, row_bytes = ldc * sizeof(float);
  for (int64_t n = 0; n < columns; n += kTileBlock)
    for (int64_t m = 0; m < rows; m += kTileBlock) {
      const char *pa = a.at(line + m, k), *pb = b.at(n, k);
      float *upper = c + m * ldc + n, *lower = upper + kTileLines * ldc;
      if (add) {
        _tile_loadd(0, upper, row_bytes);
        _tile_loadd(1, upper + kTileLines, row_bytes);
        _tile_loadd(2, lower, row_bytes);
        _tile_loadd(3, lower + kTileLines, row_bytes);
      } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
      }
      for (int64_t step = 0; step < depth; step += kTileDepth, pa += kPartsA * kTileBytes, pb += kPartsB * kTileBytes)
#pragma GCC unroll 3
        for (int turn = 0; turn < kPartsA; ++turn) {
          const int i = turn == 0 ? 0 : kPartsA - turn, partners = kPartsB < kTileParts - i ? kPartsB : kTileParts - i;
          _tile_loadd(4, pa + i * kTileBytes, 64);
          _tile_loadd(5, pa + i * kTileBytes + next_a, 64);
#pragma GCC unroll 3
          for (int q = 0; q < partners; ++q) {
            const int j = turn == 0 ? partners - 1 - q : q;  // down to 0, where the next part of A goes on
            const bool there = turn > 0 && j == 0;
            if (!there) _tile_loadd(6, pb + j * kTileBytes, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(2, 5, 6);
            if (!there) _tile_loadd(7, pb + j * kTileBytes + next_b, 64);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
          }
        }
      _tile_stored(0, upper, row_bytes);
      _tile_stored(1, upper + kTileLines, row_bytes);
      _tile_stored(2, lower, row_bytes);
      _tile_stored(3, lower + kTileLines, row_bytes);
    }
}

// The product of operands in so many parts.
inline auto tile_product_of(int64_t parts_a, int64_t parts_b) {
  return parts_b == 3   ? tile_product<3, 3>
         : parts_b == 2 ? tile_product<2, 2>
         : parts_a == 2 ? tile_product<2, 1>
                        : tile_product<1, 1>;
}
