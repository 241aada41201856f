// What every kernel on queries and keys starts from and ends with: which tokens of a sequence are real, rows of one head as packed
// floats, and gradients back to where they belong.

inline int64_t bytes_of(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }

inline const void* token_address(const HeadsView& x, int64_t token) {
  return static_cast<const char*>(x.data) + token * x.stride_token * bytes_of(x.dtype);
}

// Sequence `batch` of a packed batch, seen as the only one of its length: tokens count from its first one.
inline Attention sequence_of(const Attention& all, int64_t batch) {
  Attention op = all;
  if (!all.cu_seqlens) return op;
  const int64_t first = all.cu_seqlens[batch];
  op.tokens = all.cu_seqlens[batch + 1] - first;
  HeadsView* const inputs[] = {&op.q_s, &op.k_s, &op.q_t, &op.k_t};
  for (HeadsView* x : inputs) x->data = token_address(*x, first);
  RowValues<const float>* const rows[] = {&op.lse_s, &op.lse_t, &op.row_weight};
  for (RowValues<const float>* x : rows)
    if (x->data) x->data += first * x->stride_token;
  if (op.row_loss.data) op.row_loss.data += first * op.row_loss.stride_token;
  const auto moved = [&](void* grad, const HeadsView& view) {
    return grad ? static_cast<char*>(grad) + first * view.stride_token * bytes_of(view.dtype) : nullptr;
  };
  op.grad_q = moved(op.grad_q, op.grad_q_view);
  op.grad_k = moved(op.grad_k, op.grad_k_view);
  return op;
}

template <typename T>
inline T& row_of(const RowValues<T>& x, int64_t batch, int64_t head, int64_t token) {
  return x.data[batch * x.stride_batch + head * x.stride_head + token * x.stride_token];
}

inline int64_t real_tokens(const Attention& op, int64_t batch, int32_t* token) {
  int64_t n = 0;
  for (int64_t i = 0; i < op.tokens; ++i)
    if (!op.mask || op.mask[batch * op.tokens + i]) token[n++] = static_cast<int32_t>(i);
  return n;
}

// Where the rows of one head, or of all joined ones, of one sequence begin.
inline int64_t head_offset(const HeadsView& x, int64_t batch, int64_t head) {
  return batch * x.stride_batch + (x.joined == 1 ? head / x.group * x.stride_head : 0);
}

__attribute__((noinline)) const float* joined_row(const HeadsView& x, int64_t offset, float* scratch) {
  const int64_t size = x.size / x.joined;
  for (int64_t h = 0; h < x.joined; ++h) {
    float* part = scratch + h * size;
    const float* row = as_floats(x.data, x.dtype, offset + h / x.group * x.stride_head, x.stride_size, size, part);
    if (row != part) __builtin_memcpy(part, row, size * sizeof(float));
  }
  return scratch;
}

// One row as contiguous floats: itself where it already is that, else in `scratch`. `begin` is the head's offset.
inline const float* head_row(const HeadsView& x, int64_t begin, int64_t token, float* scratch) {
  const int64_t offset = begin + token * x.stride_token;
  return x.joined == 1 ? as_floats(x.data, x.dtype, offset, x.stride_size, x.size, scratch) : joined_row(x, offset, scratch);
}

// Heads that share one of the tensor's are added up, in place.
__attribute__((noinline)) void write_joined_row(void* out, const HeadsView& x, int64_t offset, float* row) {
  const int64_t size = x.size / x.joined;
  for (int64_t h = 0; h < x.joined; h += x.group) {
    float* total = row + h * size;
    for (int64_t other = 1; other < x.group; ++other)
      for (int64_t k = 0; k < size; ++k) total[k] += total[other * size + k];
    from_floats(total, size, out, x.dtype, offset + h / x.group * x.stride_head);
  }
}

// The way back: a gradient's row to its tensor, whose last stride is 1.
inline void write_head_row(void* out, const HeadsView& x, int64_t begin, int64_t token, float* row) {
  const int64_t offset = begin + token * x.stride_token;
  x.joined == 1 ? from_floats(row, x.size, out, x.dtype, offset) : write_joined_row(out, x, offset, row);
}

// Real rows of x times `scale` into out [rows, width]; columns past the head size and rows past n (up to `rows`) are 0.
inline void pack_rows(const HeadsView& x, int64_t batch, int64_t head, const int32_t* token, int64_t n, int64_t rows, float scale,
                      float* out, int64_t width, float* scratch) {
  const int64_t begin = head_offset(x, batch, head);
  for (int64_t r = 0; r < rows; ++r, out += width) {
    int64_t k = 0;
    if (r < n) {
      const float* row = head_row(x, begin, token[r], scratch);
      for (; k + W <= x.size; k += W) store(out + k, load(row + k) * scale);
      for (; k < x.size; ++k) out[k] = row[k] * scale;
    }
    for (; k < width; ++k) out[k] = 0;
  }
}

// Rows of x as columns: panel p holds rows [p * kPanel, ...) as [size, kPanel]; columns past n are 0.
inline void pack_panels(const HeadsView& x, int64_t batch, int64_t head, const int32_t* token, int64_t n, float* out, float* scratch) {
  const int64_t begin = head_offset(x, batch, head);
  for (int64_t first = 0; first < n; first += kPanel, out += kPanel * x.size) {
    const int64_t last = first + kPanel < n ? first + kPanel : n;
    for (int64_t r = first; r < last; ++r) {
      const float* row = head_row(x, begin, token[r], scratch);
      for (int64_t k = 0; k < x.size; ++k) out[k * kPanel + r - first] = row[k];
    }
    for (int64_t r = last; r < first + kPanel; ++r)
      for (int64_t k = 0; k < x.size; ++k) out[k * kPanel + r - first] = 0;
  }
}
