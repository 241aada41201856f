// Matrix products on tiles that stay in registers: C[M, N] (+)= A[M, K] B[K, N] in fp32 or fp64, for operands that are already packed.
//
// A tile is kMr rows x kNv vectors of C; each step of k loads kNv vectors of B, broadcasts kMr numbers of A and issues kMr * kNv
// FMAs. With 32 registers 24 accumulators leave room for B and a broadcast, and 10 loads against 24 FMAs keep the FMA units the
// limit. GCC 12 puts accumulators on the stack when the FMA is an intrinsic, so it is one line of assembly here.
//
// Callers pad M to a multiple of the tile and N to a multiple of W, so there are no remainders: what padding computes is not read.

#if defined(__AVX512F__)
inline void fma_to(vf& acc, vf a, vf b) { asm("vfmadd231ps %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b)); }
inline void fma_to(vd& acc, vd a, vd b) { asm("vfmadd231pd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b)); }
#elif defined(__AVX2__)
inline void fma_to(vf& acc, vf a, vf b) { asm("vfmadd231ps %2, %1, %0" : "+x"(acc) : "x"(a), "x"(b)); }
inline void fma_to(vd& acc, vd a, vd b) { asm("vfmadd231pd %2, %1, %0" : "+x"(acc) : "x"(a), "x"(b)); }
#else
inline void fma_to(vf& acc, vf a, vf b) { acc += a * b; }
inline void fma_to(vd& acc, vd a, vd b) { acc += a * b; }
#endif

// Rows of a tile by the number of vectors across: as many accumulators as the registers allow and kRowPad divides into.
constexpr int tile_rows(int vectors) {
#if defined(__AVX512F__)
  return vectors <= 2 ? 12 : 6;
#elif defined(__AVX2__)
  return vectors == 1 ? 12 : vectors == 2 ? 6 : vectors == 3 ? 4 : 3;
#else
  return vectors == 1 ? 12 : vectors == 2 ? 4 : vectors == 3 ? 4 : 3;
#endif
}
constexpr int kRowPad = 12;     // a multiple of every tile_rows(), so one padding of M serves all widths
static_assert(kRowPad % tile_rows(1) == 0 && kRowPad % tile_rows(2) == 0 && kRowPad % tile_rows(3) == 0 && kRowPad % tile_rows(4) == 0);
constexpr int kPanel = 4 * W;   // columns of B that one tile spans at most; half as many doubles

template <typename T>
struct Vector { typedef vf type; static constexpr int lanes = W; };
template <>
struct Vector<double> { typedef vd type; static constexpr int lanes = WD; };

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// What a tile does beside each of its steps: gemm_ahead's argument, called as (first row of the tile, rows of the tile, k).
struct NothingAhead {
  void operator()(int64_t, int64_t, int64_t) const {}
};

// One tile. A is read at a[m * a_row + k * a_col], B at b[k * ldb + n], C at c[m * ldc + n]. What was in C is added last: the sum over
// k stays short, which is more accurate than going on from C. Never inlined: inside a large kernel GCC keeps accumulators on the stack.
template <int kMr, int kNv, bool kAdd, typename T, typename Ahead>
[[gnu::noinline]] void gemm_tile(int64_t depth, const T* a, int64_t a_row, int64_t a_col, const T* b, int64_t ldb, T* c, int64_t ldc,
                                 int64_t first, const Ahead& ahead) {
  typedef typename Vector<T>::type V;
  constexpr int kLanes = Vector<T>::lanes;
  V acc[kMr][kNv];
#pragma GCC unroll 12
  for (int m = 0; m < kMr; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < kNv; ++n) acc[m][n] = V{};
  for (int64_t k = 0; k < depth; ++k, a += a_col, b += ldb) {
    ahead(first, kMr, k);
    V columns[kNv];
#pragma GCC unroll 4
    for (int n = 0; n < kNv; ++n) columns[n] = load(b + n * kLanes);
#pragma GCC unroll 12
    for (int m = 0; m < kMr; ++m) {
      const V row = set1(a[m * a_row]);
#pragma GCC unroll 4
      for (int n = 0; n < kNv; ++n) fma_to(acc[m][n], row, columns[n]);
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < kMr; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < kNv; ++n) {
      T* out = c + m * ldc + n * kLanes;
      store(out, kAdd ? load(out) + acc[m][n] : acc[m][n]);
    }
}

template <int kNv, bool kAdd, typename T, typename Ahead>
inline void gemm_rows(int64_t rows, int64_t depth, const T* a, int64_t a_row, int64_t a_col, const T* b, int64_t ldb, T* c, int64_t ldc,
                      const Ahead& ahead) {
  constexpr int kMr = tile_rows(kNv);
  for (int64_t m = 0; m < rows; m += kMr) gemm_tile<kMr, kNv, kAdd>(depth, a + m * a_row, a_row, a_col, b, ldb, c + m * ldc, ldc, m, ahead);
}

// C[rows, columns] = A B, or += where kAdd. rows: a multiple of kRowPad; columns: of a vector. B is in panels of four vectors, panel p
// at b + p * panel_stride with rows ldb apart (packed panels: ldb = kPanel, panel_stride = kPanel * depth; row-major B: ldb = its
// row, panel_stride = kPanel; half of kPanel for doubles).
template <bool kAdd, typename T, typename Ahead>
inline void gemm_ahead(int64_t rows, int64_t columns, int64_t depth, const T* a, int64_t a_row, int64_t a_col, const T* b, int64_t ldb,
                       int64_t panel_stride, T* c, int64_t ldc, const Ahead& ahead) {
  constexpr int kLanes = Vector<T>::lanes, kWide = 4 * kLanes;
  for (int64_t n = 0; n < columns; n += kWide, b += panel_stride, c += kWide) {
    const int64_t vectors = (columns - n < kWide ? columns - n : kWide) / kLanes;
    if (vectors == 4) gemm_rows<4, kAdd>(rows, depth, a, a_row, a_col, b, ldb, c, ldc, ahead);
    if (vectors == 3) gemm_rows<3, kAdd>(rows, depth, a, a_row, a_col, b, ldb, c, ldc, ahead);
    if (vectors == 2) gemm_rows<2, kAdd>(rows, depth, a, a_row, a_col, b, ldb, c, ldc, ahead);
    if (vectors == 1) gemm_rows<1, kAdd>(rows, depth, a, a_row, a_col, b, ldb, c, ldc, ahead);
  }
}

template <bool kAdd, typename T>
inline void gemm(int64_t rows, int64_t columns, int64_t depth, const T* a, int64_t a_row, int64_t a_col, const T* b, int64_t ldb,
                 int64_t panel_stride, T* c, int64_t ldc) {
  gemm_ahead<kAdd>(rows, columns, depth, a, a_row, a_col, b, ldb, panel_stride, c, ldc, NothingAhead{});
}

constexpr int64_t kDepth = 128;  // of panel_product's steps

// Asks the next step's operands into the L2 cache while a step runs, a little with each k: B and, for dW, A come from farther away, and
// asked for all at once they would be waited for.
struct NextStep {
  const float* b;  // as deep as this one, shared out over `rows` rows of A
  const float* a;  // a group of kRowPad columns; b where A needs no asking
  int64_t rows, depth;

  void operator()(int64_t first, int64_t tile, int64_t k) const {
    __builtin_prefetch(b + first * depth * kPanel / rows + k * (kPanel * tile / rows), 0, 2);
    __builtin_prefetch(a + first * depth + k * tile, 0, 2);
  }
};

// C = A B for `rows` rows (whole tiles) with B in packed panels [depth, kPanel], in steps of kDepth, whose B (32 KiB with the widest
// vectors) stays in the L1 cache while all rows use it; the next step's is asked for meanwhile. A is in rows, a_row apart, or where
// kGroups in groups [depth, kRowPad], one for each kRowPad rows of C. Columns are rounded up to whole vectors.
template <bool kGroups>
inline void panel_product(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t a_row, const float* b, float* c,
                          int64_t ldc) {
  for (int64_t k = 0; k < depth; k += kDepth) {
    const int64_t step = depth - k < kDepth ? depth - k : kDepth;
    for (int64_t n = 0; n < columns; n += kPanel) {
      const int64_t left = round_up(columns - n, W), across = left < kPanel ? left : kPanel;
      const bool last = n + kPanel >= columns;
      const float *part = b + n * depth + k * kPanel, *next = last ? b + (k + step) * kPanel : part + depth * kPanel;
      const auto product = k == 0 ? gemm_ahead<false, float, NextStep> : gemm_ahead<true, float, NextStep>;
      if (!kGroups) product(rows, across, step, a + k, a_row, 1, part, kPanel, 0, c + n, ldc, {next, next, rows, step});
      for (int64_t m = 0; kGroups && m < rows; m += kRowPad) {
        const float *group = a + m * depth, *own = group + k * kRowPad, *share = next + m * step * kPanel / rows;
        product(kRowPad, across, step, own, 1, kRowPad, part, kPanel, 0, c + m * ldc + n, ldc,
                {share, last ? own + step * kRowPad : share, rows, step});
      }
    }
  }
}
