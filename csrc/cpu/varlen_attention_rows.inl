// What both versions of varlen_attention's products start from: rows of a head as floats, and memory for them.

constexpr int64_t kKeyBlock = 256;  // keys that pass together
static_assert(kQueryBlock % kRowPad == 0 && kKeyBlock % kPanel == 0);

// Memory taken piece by piece, in whole cache lines.
struct Floats {
  float* memory;
  int64_t taken = 0;

  float* take(int64_t floats) {
    float* begin = memory + taken;
    taken += round_up(floats, 16);
    return begin;
  }
};

// Rows of a head, `width` apart, zeros behind the head and behind the last row. `scratch`: of a row.
inline void copy_head(const TokensView& x, int64_t first, int64_t n, int64_t rows, int64_t head, int64_t size, int64_t width, float* out,
                      float* scratch) {
  for (int64_t r = 0; r < rows; ++r, out += width) {
    if (r < n) {
      const int64_t offset = (first + r) * x.stride_token + head * size * x.stride_column;
      __builtin_memcpy(out, as_floats(x.data, x.dtype, offset, x.stride_column, size, scratch), size * sizeof(float));
    }
    for (int64_t k = r < n ? size : 0; k < width; ++k) out[k] = 0;
  }
}
