// Transposition of matrices in whole squares of W x W.
//
// A square is transposed in registers by exchanging, for each bit of the position, what lies above the diagonal in one vector with what
// lies below it in the other.

template <int... j>
struct Lanes {};
template <int n, int... j>
struct MakeLanes : MakeLanes<n - 1, n - 1, j...> {};
template <int... j>
struct MakeLanes<0, j...> {
  typedef Lanes<j...> type;
};

template <int kStep, int... j>
inline void exchange(vf& a, vf& b, Lanes<j...>) {
  const vf low = __builtin_shufflevector(a, b, (j & kStep ? W + j - kStep : j)...);
  b = __builtin_shufflevector(a, b, (j & kStep ? W + j : j + kStep)...);
  a = low;
}

template <int kStep>
inline void transpose_step(vf* x) {
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i)
    if (!(i & kStep)) exchange<kStep>(x[i], x[i + kStep], typename MakeLanes<W>::type{});
}

inline void transpose_square(const float* in, int64_t in_row, float* out, int64_t out_row) {
  vf x[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) x[i] = load(in + i * in_row);
  transpose_step<1>(x);
  transpose_step<2>(x);
  if constexpr (W > 4) transpose_step<4>(x);
  if constexpr (W > 8) transpose_step<8>(x);
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) store(out + i * out_row, x[i]);
}

// out[c * out_row + r] = in[r * in_row + c] for whole squares of W; both sides must have room for them.
inline void transpose(const float* in, int64_t in_row, int64_t rows, int64_t columns, float* out, int64_t out_row) {
  for (int64_t c = 0; c < columns; c += W)
    for (int64_t r = 0; r < rows; r += W) transpose_square(in + r * in_row + c, in_row, out + c * out_row + r, out_row);
}
