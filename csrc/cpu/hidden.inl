// What the losses on hidden states share: sums over a row, the rows of a work item, and where a row's gradient goes.

template <typename T>
inline vf load_up_to(const T* p, int64_t lanes, float fill) {
  if (lanes == W) return load(p);
  T first[W] = {};
  __builtin_memcpy(first, p, lanes * sizeof(T));
  vf x = load(first);
  for (int64_t i = lanes; i < W; ++i) x[i] = fill;
  return x;
}

template <typename T>
inline void store_up_to(T* p, vf x, int64_t lanes) {
  if (lanes == W) return store(p, x);
  T all[W];
  store(all, x);
  __builtin_memcpy(p, all, lanes * sizeof(T));
}

// The sums over n elements of what `add(position, valid lanes, sums)` adds to kSums vectors: four chains of additions for each, emptied
// into a double before they grow long.
template <int kSums, typename Add>
inline void hidden_sums(int64_t n, const Add& add, double* totals) {
  constexpr int64_t kChunk = 1024;
  for (int k = 0; k < kSums; ++k) totals[k] = 0;
  for (int64_t begin = 0; begin < n; begin += kChunk) {
    const int64_t end = begin + kChunk < n ? begin + kChunk : n;
    vf a[kSums] = {}, b[kSums] = {}, c[kSums] = {}, d[kSums] = {};
    int64_t i = begin;
    for (; i + 4 * W <= end; i += 4 * W) {
      add(i, W, a);
      add(i + W, W, b);
      add(i + 2 * W, W, c);
      add(i + 3 * W, W, d);
    }
    for (; i + W <= end; i += W) add(i, W, a);
    if (i < end) add(i, end - i, a);
    for (int k = 0; k < kSums; ++k) totals[k] += sum((a[k] + b[k]) + (c[k] + d[k]));
  }
}

// The sum of term(position, valid lanes) over n elements.
template <typename Term>
inline double hidden_sum(int64_t n, const Term& term) {
  double total;
  hidden_sums<1>(n, [&](int64_t i, int64_t lanes, vf* sums) { sums[0] += term(i, lanes); }, &total);
  return total;
}

// Runs f with the type that a layer's rows are read as: that of both states if their features lie in a row, else float, for copies.
template <typename F>
inline void hidden_with_type(const HiddenLayer& layer, const F& f) {
  const StatesView &s = layer.student, &t = layer.teacher;
  const bool in_place = s.dtype == t.dtype && s.stride_feature == 1 && t.stride_feature == 1;
  if (in_place && s.dtype == DType::kBF16) return f.template operator()<Bf16>();
  if (in_place && s.dtype == DType::kF16) return f.template operator()<F16>();
  f.template operator()<float>();
}

template <typename T = float>
inline const T* hidden_row(const StatesView& view, int64_t tokens, int64_t token, int64_t features, float* scratch) {
  const int64_t offset = token / tokens * view.stride_batch + token % tokens * view.stride_token;
  if constexpr (__is_same(T, float)) return as_floats(view.data, view.dtype, offset, view.stride_feature, features, scratch);
  else return static_cast<const T*>(view.data) + offset;
}

// How far ahead to ask for what follows a row: the next row, as they mostly lie, and nothing where `scratch` holds a copy. A row that is
// walked through several times leaves the hardware's prefetcher idle meanwhile (hidden_cosine forward at 8 x 256 x 768, 0.32 ms without
// asking in the first walk and 0.28 ms with it).
inline int64_t hidden_ahead(const void* row, const float* scratch, int64_t features) { return row == scratch ? 0 : features; }

// Which layer and which of its tokens [begin, end) an item is.
struct HiddenBlock {
  const HiddenLayer& layer;
  int64_t begin, end;
};

inline HiddenBlock hidden_block(const HiddenLayers& op, int64_t item) {
  int64_t l = op.num_layers - 1;
  while (op.layers[l].first_item > item) --l;
  const HiddenLayer& layer = op.layers[l];
  const int64_t per_item = hidden_tokens_per_item(layer.features), all = op.batch * op.tokens;
  const int64_t begin = (item - layer.first_item) * per_item;
  return {layer, begin, begin + per_item < all ? begin + per_item : all};
}

// A token's gradient is value(position, valid lanes); T is what rows are read as. Large fp32 ones go past the caches: the bulk of the
// traffic is writes that need no reading. `row` holds what is converted; `value` may read it.
template <typename T, typename Value>
inline void hidden_put_gradient(const HiddenLayers& op, const HiddenLayer& layer, int64_t token, float* row, const Value& value) {
  const int64_t n = layer.features;
  const DType dtype = layer.student.dtype;
  if constexpr (!__is_same(T, float)) {
    T* out = static_cast<T*>(layer.grad_student) + token * n;
    return for_vectors(n, [&](int64_t i, int64_t lanes) { store_up_to(out + i, value(i, lanes), lanes); });
  }
  if (dtype != DType::kF32) {
    for_vectors(n, [&](int64_t i, int64_t lanes) { store_up_to(row + i, value(i, lanes), lanes); });
    return from_floats(row, n, layer.grad_student, dtype, token * n);
  }
  float* out = static_cast<float*>(layer.grad_student) + token * n;
  for_vectors(n, [&](int64_t i, int64_t lanes) {
    const vf x = value(i, lanes);
    lanes < W ? store_n(out + i, x, lanes) : op.past_cache ? stream(out + i, x) : store(out + i, x);
  });
}

// A padded token's: 0.
inline void hidden_no_gradient(const HiddenLayers& op, const HiddenLayer& layer, int64_t token) {
  const int64_t n = layer.features;
  const auto zero = [](int64_t, int64_t) { return vf{}; };
  if (layer.student.dtype == DType::kF32) return hidden_put_gradient<float>(op, layer, token, nullptr, zero);
  __builtin_memset(static_cast<uint16_t*>(layer.grad_student) + token * n, 0, n * sizeof(uint16_t));
}
