// What the encoder op shares on every device: its blocks' parameters from tensors, checked.
#pragma once
#include <vector>

#include "../ops/encoder.h"
#include "quant_linear.h"

namespace kd {

constexpr size_t kBlockLinears = 6, kBlockNorms = 4;  // tensors of each kind in a block

inline NormalizeRows norm_of(const Tensor& weight, const Tensor& bias, const Tensor& x, double eps) {
  NormalizeRows op{};
  op.columns = x.size(1);
  op.eps = static_cast<float>(eps);
  op.dtype = dtype_of(x, "x");
  op.norm_dtype = dtype_of(weight, "norms");
  for (const Tensor* part : {&weight, &bias})
    STD_TORCH_CHECK(part->is_contiguous() && part->numel() == op.columns && part->scalar_type() == weight.scalar_type() &&
                        part->device() == x.device(),
                    "norms must be contiguous [features], a weight and a bias alike, on the device of x");
  op.weight = weight.const_data_ptr();
  op.bias = bias.const_data_ptr();
  return op;
}

// weights, biases and norms as kdkernels/ops/encoder.py has them; describe(i, columns, QuantWeights&) reads weight i, which the device has
// laid out and which must have that many columns.
template <class Describe>
std::vector<EncoderBlock> encoder_blocks(const Tensor& x, const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
                                         const std::vector<Tensor>& norms, int64_t num_heads, int64_t activation, double eps,
                                         const Describe& describe) {
  STD_TORCH_CHECK(x.dim() == 2 && x.is_contiguous(), "x must be contiguous [tokens, features]");
  const size_t count = weights.size() / kBlockLinears;
  STD_TORCH_CHECK(count > 0 && weights.size() == count * kBlockLinears && biases.size() == weights.size() &&
                      norms.size() == count * kBlockNorms,
                  "a block has 6 weights, 6 biases and 4 tensors of norms");
  const int64_t features = x.size(1);
  const auto linear = [&](size_t i, int64_t columns) {
    QuantLinear op{};
    describe(i, columns, op.weights);
    describe_bias(biases[i], op);
    STD_TORCH_CHECK(biases[i].device() == x.device(), "biases must be on the device of x");
    STD_TORCH_CHECK(op.weights.columns == columns, "weights must have as many columns as what they multiply");
    STD_TORCH_CHECK(!op.weights.column_scales, "weights must not scale columns: projections share their codes");
    return op;
  };
  std::vector<EncoderBlock> blocks(count);
  for (size_t b = 0; b < count; ++b) {
    EncoderBlock& block = blocks[b];
    const size_t first = b * kBlockLinears;
    const Tensor* norm = &norms[b * kBlockNorms];
    for (size_t i = 0; i < 3; ++i) {
      block.qkv[i] = linear(first + i, features);
      const QuantWeights &w = block.qkv[i].weights, &q = block.qkv[0].weights;
      STD_TORCH_CHECK(w.rows == q.rows && w.bits == q.bits && w.segment == q.segment && !w.zeros == !q.zeros,
                      "projections must have one shape and one scheme");
    }
    STD_TORCH_CHECK(num_heads > 0 && block.qkv[0].weights.rows % num_heads == 0, "num_heads must divide the projections' features");
    block.output = linear(first + 3, block.qkv[0].weights.rows);
    block.up = linear(first + 4, features);
    block.down = linear(first + 5, block.up.weights.rows);
    describe_activation(activation, block.up);
    STD_TORCH_CHECK(block.output.weights.rows == features && block.down.weights.rows == features, "blocks must end in x's features");
    block.attention_norm = norm_of(norm[0], norm[1], x, eps);
    block.output_norm = norm_of(norm[2], norm[3], x, eps);
  }
  return blocks;
}

}  // namespace kd
