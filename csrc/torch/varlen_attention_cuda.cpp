// varlen_attention for CUDA tensors, on torch's current stream. Lengths stay on the device, so they are not checked: the kernel reads and
// writes nothing beside the tensors whatever they are, and rows from cu_seqlens[sequences] on keep what the allocator gave.
#include "../cuda/varlen_attention.h"

#include "stream.h"
#include "varlen_attention.h"

namespace kd {
namespace {

Tensor varlen_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens, int64_t num_heads, double scale) {
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  for (const Tensor* x : {&k, &v, &cu_seqlens})
    STD_TORCH_CHECK(x->device() == q.device(), "k, v and cu_seqlens must be on q's device");
  VarlenAttention op = describe_attention(q, k, v, num_heads, scale);
  STD_TORCH_CHECK(op.k.dtype == op.q.dtype && op.v.dtype == op.q.dtype, "q, k and v must have one dtype on CUDA");
  STD_TORCH_CHECK(op.size <= cuda::kMostHeadSize, "heads on CUDA have at most ", cuda::kMostHeadSize, " features, got ", op.size);
  describe_bounds(cu_seqlens, op);
  Tensor out = torch::stable::new_empty(q, {q.size(0), q.size(1)}, q.scalar_type());
  op.out = out.mutable_data_ptr();
  op.out_dtype = op.q.dtype;
  check_status(cuda::varlen_attention(op, current_stream(q)), "varlen_attention");
  return out;
}

}  // namespace
}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CUDA, m) { m.impl("varlen_attention", TORCH_BOX(&kd::varlen_attention)); }
