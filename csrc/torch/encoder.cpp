// The blocks of a post-norm encoder (encoder_cpu.h) for CPU tensors, all in one call.
//
// Sequences don't see each other: cut into groups of as many tokens, each of which passes through all blocks on one worker, what a block
// writes stays in that worker's second-level cache, and nobody waits. A batch that can't be cut evenly runs phase by phase (phases.h), all
// workers on each.
#include "encoder_cpu.h"

#include "varlen_attention.h"

namespace kd {
namespace {

constexpr int64_t kSharedChunk = 480;  // tokens; 3072 inner activations of each take 3 MB in the caches of all workers
constexpr int64_t kGroupChunk = 256;   // in one worker's
// Tokens of a group: weights are read anew for each, which takes as long as some 150 tokens.
constexpr int64_t kGroupTokens = 512, kLeastGroupTokens = 192;

// Sequences that lie end to end, from token `first` on.
struct Group {
  int64_t first;
  std::vector<int32_t> cu_seqlens;

  int64_t tokens() const { return cu_seqlens.back(); }
  VarlenAttention attention(const VarlenAttention& of) const {
    VarlenAttention op = of;
    op.cu_seqlens = cu_seqlens.data();
    op.sequences = cu_seqlens.size() - 1;
    op.longest = 0;
    for (int64_t i = 0; i < op.sequences; ++i) op.longest = std::max<int64_t>(op.longest, cu_seqlens[i + 1] - cu_seqlens[i]);
    return op;
  }
};

// The sequences in groups of about as many tokens, as many for every worker; none where they can't be cut evenly.
std::vector<Group> even_groups(const VarlenAttention& all, int64_t tokens) {
  const int64_t workers = torch::stable::get_num_threads(), rounds = (tokens / workers + kGroupTokens / 2) / kGroupTokens;
  const int64_t count = workers * std::max<int64_t>(1, rounds);
  if (tokens < count * kLeastGroupTokens) return {};
  std::vector<Group> groups;
  int64_t sequence = 0, largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    Group group{all.cu_seqlens[sequence], {0}};
    const int64_t end = (i + 1) * tokens / count;
    // Those whose middle lies before its end.
    while (sequence < all.sequences && (int64_t{all.cu_seqlens[sequence]} + all.cu_seqlens[sequence + 1]) / 2 < end)
      group.cu_seqlens.push_back(all.cu_seqlens[++sequence] - static_cast<int32_t>(group.first));
    largest = std::max(largest, group.tokens());
    groups.push_back(std::move(group));
  }
  return largest * count > tokens + tokens / 8 ? std::vector<Group>() : groups;
}

Tensor encoder(const Tensor& x, const Tensor& cu_seqlens, std::vector<Tensor> weights, std::vector<Tensor> biases,
               std::vector<Tensor> norms, int64_t num_heads, int64_t activation, double eps, bool all_states,
               std::vector<int64_t> /*layouts: the headers of weights have them*/) {
  const auto describe = [&](size_t i, int64_t /*columns: the header has them*/, QuantWeights& w) { describe_weights(weights[i], w); };
  const Model model{encoder_blocks(x, weights, biases, norms, num_heads, activation, eps, describe), x.size(1)};
  const int64_t tokens = x.size(0), states = all_states ? model.blocks.size() : 1;
  VarlenAttention attention{};
  attention.heads = num_heads;
  for (const EncoderBlock& block : model.blocks) {
    for (const NormalizeRows* norm : {&block.attention_norm, &block.output_norm})
      STD_TORCH_CHECK(norm->dtype == DType::kF32 && norm->norm_dtype == DType::kF32, "x and norms must be float32 on the CPU");
    attention.size = std::max(attention.size, block.qkv[0].weights.rows / num_heads);
  }
  describe_sequences(cu_seqlens, tokens, attention);
  Tensor out = new_tensor(x, {states, tokens, model.features}, ScalarType::Float);
  if (tokens == 0) return out;
  const float* from = static_cast<const float*>(x.const_data_ptr());
  float* to = static_cast<float*>(out.mutable_data_ptr());
  const int64_t state_stride = all_states ? tokens * model.features : 0;
  const std::vector<Group> groups = even_groups(attention, tokens);
  if (groups.empty()) {
    Encoder encoder(model, attention, tokens, kSharedChunk);
    Tensor memory = new_tensor(x, {encoder.take(nullptr)}, ScalarType::Byte);
    encoder.take(memory.mutable_data_ptr());
    Phases phases;
    encoder.run(from, to, state_stride, &phases, nullptr);
    phases.run(encoder.scratch_floats());
    return out;
  }
  std::vector<Encoder> encoders;
  int64_t bytes = 0, scratch_floats = 0;
  for (const Group& group : groups) {
    encoders.emplace_back(model, group.attention(attention), group.tokens(), kGroupChunk);
    bytes = std::max(bytes, encoders.back().take(nullptr));
    scratch_floats = std::max(scratch_floats, round_up_to(encoders.back().scratch_floats(), 16));
  }
  run_items(encoders.size(), scratch_floats + bytes / sizeof(float), [&](int64_t i, float* scratch) {
    const int64_t first = groups[i].first * model.features;
    encoders[i].take(scratch + scratch_floats);
    encoders[i].run(from + first, to + first, state_stride, nullptr, scratch);
  });
  return out;
}

}  // namespace
}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) { m.impl("encoder", TORCH_BOX(&kd::encoder)); }
