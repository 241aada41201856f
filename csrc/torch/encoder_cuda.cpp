// The encoder for CUDA tensors: its blocks queued on torch's current stream. How many tokens there are is cu_seqlens' to say, on the
// device: x may have more rows, and what the result has there is undefined.
#include "../cuda/encoder.h"

#include "../cuda/varlen_attention.h"
#include "encoder.h"
#include "quant_linear_cuda.h"
#include "stream.h"
#include "varlen_attention.h"

namespace kd {
namespace {

Tensor encoder(const Tensor& x, const Tensor& cu_seqlens, std::vector<Tensor> weights, std::vector<Tensor> biases,
               std::vector<Tensor> norms, int64_t num_heads, int64_t activation, double eps, bool all_states,
               std::vector<int64_t> layouts) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  STD_TORCH_CHECK(layouts.size() == weights.size() && biases.size() == weights.size(), "every weight has a bias and a layout");
  const std::vector<EncoderBlock> blocks =
      encoder_blocks(x, weights, biases, norms, num_heads, activation, eps, [&](size_t i, int64_t columns, QuantWeights& w) {
        describe_prepared(weights[i], biases[i].numel(), columns, layouts[i], x, w);
      });
  for (const EncoderBlock& block : blocks)
    STD_TORCH_CHECK(block.output.weights.columns <= num_heads * cuda::kMostHeadSize, "heads must have at most ", cuda::kMostHeadSize,
                    " features on CUDA");
  STD_TORCH_CHECK(cu_seqlens.device() == x.device(), "cu_seqlens must be on the device of x");
  cuda::Encoder op{};
  op.blocks = blocks.data();
  op.count = static_cast<int64_t>(blocks.size());
  op.x = x.const_data_ptr();
  op.rows = x.size(0);
  op.features = x.size(1);
  op.dtype = dtype_of(x, "x");
  op.attention.heads = num_heads;
  describe_bounds(cu_seqlens, op.attention);
  op.all_states = all_states;
  Tensor out = new_empty(x, {all_states ? op.count : 1, op.rows, op.features}, x.scalar_type());
  op.out = out.mutable_data_ptr();
  Tensor workspace = new_empty(x, {cuda::encoder_workspace_bytes(op)}, ScalarType::Byte);
  check_status(cuda::encoder(op, workspace.mutable_data_ptr(), current_stream(x)), "encoder");
  return out;
}

}  // namespace
}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CUDA, m) { m.impl("encoder", TORCH_BOX(&kd::encoder)); }
