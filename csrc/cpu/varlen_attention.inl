// varlen_attention: softmax(scale q k^T) v of one block of queries, in memory that does not grow with the sequence.
//
// Keys pass in blocks. What earlier blocks left, the sum of exponentials and of their products with v, is scaled down when a larger score
// comes (the online softmax); at the end one division per row remains. Scores stay q k^T until the exponential multiplies them by
// scale * log2(e) without rounding the product. The two products are varlen_attention_products.inl's or, on AMX,
// varlen_attention_products_amx.inl's; bf16 on AMX goes its own way, varlen_attention_bf16_amx.inl.
//
// A NaN or an infinite score makes its row NaN, as in torch. The running maximum starts at the lowest finite number, so that a first
// block of -inf alone leaves zeros that later blocks may add to.

int64_t varlen_attention_scratch(const VarlenAttention& op) {
  AttentionBuffers b;
#if defined(__AMX_BF16__)
  NarrowBuffers narrow;
  if (takes_narrow(op)) return lay_out_narrow(op, nullptr, narrow);
#endif
  return lay_out_attention(op, nullptr, b);
}

// Scores of a block of keys to exponentials, in place, with zeros in the columns behind the last key; brings what is in `out` to the same
// maximum.
inline void softmax_block(const AttentionBuffers& b, int64_t queries, int64_t keys, int64_t columns, float scale) {
  const vf times = set1(scale * kLog2E);
  for (int64_t m = 0; m < queries; ++m) {
    float *row = b.scores + m * kKeyBlock, *out = b.out + m * b.width;
    vf most = set1(b.largest[m]);
    for_vectors(keys, [&](int64_t i, int64_t lanes) { most = vmax(load_up_to(row + i, lanes, -__FLT_MAX__), most); });
    const float largest = max(most);
    vf total{};
    for_vectors(keys, [&](int64_t i, int64_t lanes) {
      const vf p = exp2_scaled(load_up_to(row + i, lanes, -__builtin_inff()) - largest, times);
      total += p;
      store(row + i, p);
    });
    for (int64_t i = round_up(keys, W); i < columns; i += W) store(row + i, vf{});
    const vf before = exp2_scaled(set1(b.largest[m] - largest), times);
    b.total[m] = b.total[m] * before[0] + sum(total);
    b.largest[m] = largest;
    for (int64_t k = 0; k < b.width; k += W) store(out + k, load(out + k) * before);
  }
}

void varlen_attention(const VarlenAttention& op, int64_t number, float* scratch) {
  const AttentionItem item(op, number);
  if (item.queries <= 0) return;
#if defined(__AMX_BF16__)
  if (takes_narrow(op)) return varlen_attention_narrow(op, item, scratch);
#endif
  AttentionBuffers b;
  lay_out_attention(op, scratch, b);
  const int64_t queries = item.queries, rows = round_up(queries, kScoreRows);
  pack_queries(op, b, item.first, queries, rows, item.head);
  for (int64_t m = 0; m < queries; ++m) {
    b.largest[m] = -__FLT_MAX__;
    b.total[m] = 0;
  }
  for (int64_t i = 0; i < rows * b.width; ++i) b.out[i] = 0;
  for (int64_t key = item.begin; key < item.end; key += kKeyBlock) {
    const int64_t keys = item.end - key < kKeyBlock ? item.end - key : kKeyBlock, columns = round_up(keys, kScoreColumns);
    pack_keys(op, b, key, keys, columns, item.head);
    multiply_keys(b, rows, columns);
    softmax_block(b, queries, keys, columns, op.scale);
    pack_values(op, b, key, keys, columns, item.head);
    multiply_values(b, rows, columns);
  }
  if (leave_to_fmas(op, b, queries, number, scratch)) return;
  finish_attention(op, item, b.out, b.width, b.total);
}
