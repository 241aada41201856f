// varlen_attention for CPU tensors.
#include "varlen_attention.h"

namespace kd {
namespace {

TokensView tokens_view(const Tensor& x, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == like.size(0) && x.size(1) == like.size(1), name, " must be [tokens, heads * size] as q is");
  return {x.const_data_ptr(), x.stride(0), x.stride(1), dtype_of(x, name)};
}

Tensor varlen_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens, int64_t num_heads, double scale) {
  const cpu::Table& kernels = table();
  VarlenAttention op{};
  op.q = tokens_view(q, q, "q");
  op.k = tokens_view(k, q, "k");
  op.v = tokens_view(v, q, "v");
  STD_TORCH_CHECK(num_heads > 0 && q.size(1) > 0 && q.size(1) % num_heads == 0, "num_heads must divide the features of q");
  STD_TORCH_CHECK(scale > 0, "scale must be > 0");
  describe_sequences(cu_seqlens, q.size(0), op);
  op.heads = num_heads;
  op.size = q.size(1) / num_heads;
  op.scale = static_cast<float>(scale);
  Tensor out = new_tensor(q, {q.size(0), q.size(1)}, q.scalar_type());
  op.out = out.mutable_data_ptr();
  op.out_dtype = op.q.dtype;
  run_items(cpu::varlen_attention_items(op), kernels.varlen_attention_scratch(op),
            [&](int64_t item, float* scratch) { kernels.varlen_attention(op, item, scratch); });
  return out;
}

}  // namespace
}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) { m.impl("varlen_attention", TORCH_BOX(&kd::varlen_attention)); }
