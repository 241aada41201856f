// varlen_attention for CPU tensors.
#include "varlen_attention.h"

namespace kd {
namespace {

Tensor varlen_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens, int64_t num_heads, double scale) {
  const cpu::Table& kernels = table();
  VarlenAttention op = describe_attention(q, k, v, num_heads, scale);
  describe_sequences(cu_seqlens, op.tokens, op);
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
