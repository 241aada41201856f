// Losses between two attention maps straight from queries and keys: KL, and mean squared error of probabilities or of scores.
//
//   x = scale q k^T + bias / T over the keys that a query sees, the loss and dx of each row in attention_rows.inl
//   dq = scale dx k, dk = scale dx^T q
//
// One item is one (batch, head), or the heads that share one head of keys. Its real tokens are packed (padding costs nothing
// afterwards), then rows of the maps are made in blocks that fit the L2 cache: both scores, both softmaxes, the loss, dx in place, and dx
// goes into dq and dk while it is hot. So the maps are computed once, in memory linear in N. Floor: 2 n^2 (d_s + d_t) + 4 n^2 d_s fp32
// operations and 2 n^2 exponentials; half of it under a causal mask, where a block stops at its last query's own key.

struct MapSizes {
  int64_t tokens, rows, columns;  // tokens; padded to whole tiles; the distance between rows of a map block
  int64_t block;                  // rows of a map block
  int64_t depth_s;                // the student's head size, padded to whole vectors
};

inline MapSizes map_sizes(const Attention& op) {
  MapSizes s;
  s.tokens = op.tokens;
  s.rows = round_up(op.tokens, kRowPad);
  s.columns = round_up(op.tokens, kPanel * kRowPad / 4) + W;  // odd in vectors: rows do not all fall into the same cache sets
  constexpr int64_t kBlockFloats = 65536;                     // two map blocks are 512 KiB
  const int64_t fitting = kBlockFloats / s.columns / kRowPad * kRowPad;
  s.block = fitting < kRowPad ? kRowPad : fitting > 4 * kRowPad ? 4 * kRowPad : fitting;
  s.depth_s = round_up(op.q_s.size, W);
  return s;
}

// The item's operands, packed: queries times the sign of the scale by rows, keys by rows and as transposed panels.
struct MapBuffers {
  int32_t* token;  // packed row -> token
  float *q_s, *q_t, *k_s, *panels_s, *panels_t;
  float *map_s, *map_t, *dq, *dk, *row, *bias;
};

// Lays the buffers out in `scratch`; returns the number of floats. With a null scratch it only counts.
inline int64_t map_buffers(const Attention& op, const MapSizes& s, float* scratch, MapBuffers& b) {
  int64_t used = 0;
  const auto take = [&](int64_t floats) {
    float* p = scratch ? scratch + used : nullptr;
    used += round_up(floats, 16);
    return p;
  };
  const int64_t panel_rows = round_up(op.tokens, kPanel);
  b.token = reinterpret_cast<int32_t*>(take(op.tokens));
  b.q_s = take(s.rows * s.depth_s);
  b.q_t = take(s.rows * op.q_t.size);
  b.k_s = take(s.rows * s.depth_s);
  b.panels_s = take(panel_rows * op.q_s.size);
  b.panels_t = take(panel_rows * op.q_t.size);
  b.map_s = take(s.block * s.columns);
  b.map_t = take(s.block * s.columns);
  b.dq = take(s.rows * s.depth_s);
  b.dk = take(s.rows * s.depth_s);
  b.row = take(s.depth_s > op.q_t.size ? s.depth_s : op.q_t.size);
  b.bias = take(op.bias_s.data || op.bias_t.data ? op.tokens : 0);
  return used;
}

int64_t attention_scratch(const Attention& op) {
  MapBuffers unused;
  return map_buffers(op, map_sizes(op), nullptr, unused);
}

inline float row_weight(const Attention& op, int64_t batch, int64_t head, int64_t token) {
  return op.row_weight.data ? op.grad_weight * row_of(op.row_weight, batch, head, token) : op.grad_weight;
}

// Scores of one query that has a bias: products with the first n packed keys times `scale`, and the bias of those keys.
inline void add_bias(const BiasView& bias, int64_t batch, int64_t head, int64_t query, const int32_t* token, int64_t n, float scale,
                     float* row, float* scratch) {
  const vf factor = set1(scale);
  for_vectors(n, [&](int64_t j, int64_t lanes) { store_up_to(row + j, load_up_to(row + j, lanes, 0) * factor, lanes); });
  const int64_t keys = n ? token[n - 1] + 1 : 0;
  for (int64_t part = 0; part < bias.joined; ++part) {
    const int64_t offset = batch * bias.stride_batch + (head + part) * bias.stride_head + query * bias.stride_query;
    const float* values = as_floats(bias.data, bias.dtype, offset, bias.stride_key, keys, scratch);
    for (int64_t j = 0; j < n; ++j) row[j] += values[token[j]] * bias.factor;
  }
}

// Gradient rows of all tokens: a * x (+ b * y where y is not null) for the real ones, 0 for the others.
inline void write_gradient(const Attention& op, const MapBuffers& buf, int64_t batch, int64_t head, int64_t n, void* out,
                           const HeadsView& view, const float* x, float a, const float* y, float b, int64_t width) {
  if (!out) return;
  const int64_t begin = head_offset(view, batch, head);
  int64_t r = 0;
  for (int64_t i = 0; i < op.tokens; ++i) {
    const bool real = r < n && buf.token[r] == i;
    for (int64_t k = 0; k < width; k += W) {
      vf g = set1(0.0f);
      if (real) g = y ? load(x + r * width + k) * a + load(y + r * width + k) * b : load(x + r * width + k) * a;
      store(buf.row + k, g);
    }
    r += real;
    write_head_row(out, view, begin, i, buf.row);
  }
}

// The maps of one head, from packed keys of the student: losses, and where the gradients are wanted dq, and dx^T q in dk, or added to
// what is there.
inline double head_maps(const Attention& op, const MapSizes& size, const MapBuffers& buf, int64_t batch, int64_t head, int64_t n,
                        bool add) {
  const int64_t head_t = op.head_map ? op.head_map[head] : head;
  const bool grad = op.grad_q || op.grad_k;
  const bool normalized = op.lse_s.data && op.lse_t.data && op.scale_s != 0 && op.scale_t != 0;
  const RowScales scale = row_scales(op);
  pack_rows(op.q_s, batch, head, buf.token, n, round_up(n, kRowPad), sign_of(op.scale_s), buf.q_s, size.depth_s, buf.row);
  pack_rows(op.q_t, batch, head_t, buf.token, n, round_up(n, kRowPad), sign_of(op.scale_t), buf.q_t, op.q_t.size, buf.row);
  pack_panels(op.k_t, batch, head_t, buf.token, n, buf.panels_t, buf.row);

  double total = 0;
  for (int64_t first = 0; first < n; first += size.block) {
    const int64_t rows = n - first < size.block ? n - first : size.block, padded = round_up(rows, kRowPad);
    const int64_t keys = op.causal ? first + rows : n, columns = round_up(keys, W);
    gemm<false>(padded, columns, op.q_s.size, buf.q_s + first * size.depth_s, size.depth_s, 1, buf.panels_s, kPanel,
                kPanel * op.q_s.size, buf.map_s, size.columns);
    gemm<false>(padded, columns, op.q_t.size, buf.q_t + first * op.q_t.size, op.q_t.size, 1, buf.panels_t, kPanel,
                kPanel * op.q_t.size, buf.map_t, size.columns);
    for (int64_t r = 0; r < rows; ++r) {
      float *s = buf.map_s + r * size.columns, *t = buf.map_t + r * size.columns;
      const int64_t token = buf.token[first + r], seen = op.causal ? first + r + 1 : n;
      if (op.bias_s.data)
        add_bias(op.bias_s, batch, head, token, buf.token, seen, __builtin_fabsf(op.scale_s), s, buf.bias);
      if (op.bias_t.data)
        add_bias(op.bias_t, batch, head_t, token, buf.token, seen, __builtin_fabsf(op.scale_t), t, buf.bias);
      const float weight = grad ? row_weight(op, batch, head, token) : 0;
      double loss;
      if (normalized) {
        const float lse_s = row_of(op.lse_s, batch, head, token), lse_t = row_of(op.lse_t, batch, head_t, token);
        loss = grad ? normalized_row<true>(op.kind, scale, s, t, seen, weight, lse_s, lse_t)
                    : normalized_row<false>(op.kind, scale, s, t, seen, 0, lse_s, lse_t);
      } else {
        loss = grad ? map_row<true>(op.kind, scale, s, t, seen, weight) : map_row<false>(op.kind, scale, s, t, seen, 0);
      }
      for (int64_t j = seen; j < keys; ++j) s[j] = 0;
      if (op.row_loss.data) row_of(op.row_loss, batch, head, token) = static_cast<float>(loss);
      total += loss;
    }
    if (!grad) continue;
    gemm<false>(padded, size.depth_s, keys, buf.map_s, size.columns, 1, buf.k_s, size.depth_s, kPanel, buf.dq + first * size.depth_s,
                size.depth_s);
    const auto into_dk = first == 0 && !add ? gemm<false, float> : gemm<true, float>;
    into_dk(round_up(keys, kRowPad), size.depth_s, rows, buf.map_s, 1, size.columns, buf.q_s + first * size.depth_s, size.depth_s, kPanel,
            buf.dk, size.depth_s);
  }
  return total;
}

void attention_maps(const Attention& all, int64_t item, float* scratch) {
  const int64_t groups = all.heads / all.group, batch = item / groups, first_head = item % groups * all.group;
  const Attention op = sequence_of(all, batch);
  const MapSizes size = map_sizes(op);
  MapBuffers buf;
  map_buffers(op, size, scratch, buf);
  const int64_t n = real_tokens(op, batch, buf.token), key_rows = round_up(n, kRowPad);
  const bool grad = op.grad_q || op.grad_k;
  pack_panels(op.k_s, batch, first_head, buf.token, n, buf.panels_s, buf.row);
  if (grad) {
    pack_rows(op.k_s, batch, first_head, buf.token, n, key_rows, 1, buf.k_s, size.depth_s, buf.row);
    if (op.causal) __builtin_memset(buf.dk, 0, key_rows * size.depth_s * sizeof(float));  // the first block sees but the first keys
  }
  const float rest = __builtin_fabsf(op.scale_s);  // the packed queries carry the sign
  for (int64_t head = first_head; head < first_head + op.group; ++head) {
    if (op.row_loss.data)
      for (int64_t i = 0; i < op.tokens; ++i) row_of(op.row_loss, batch, head, i) = 0;
    const double total = head_maps(op, size, buf, batch, head, n, op.causal || head != first_head);
    if (op.item_loss) op.item_loss[item] = total;
    if (!grad) continue;
    const float* both = op.grad_k ? nullptr : buf.dk;
    write_gradient(op, buf, batch, head, n, op.grad_q, op.grad_q_view, buf.dq, op.scale_s, both, rest, size.depth_s);
  }
  if (grad) write_gradient(op, buf, batch, first_head, n, op.grad_k, op.grad_k_view, buf.dk, rest, nullptr, 0, size.depth_s);
}
