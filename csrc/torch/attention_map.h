// What attention_map_mse and attention_map_kl share on the torch side: tensors to kd::AttentionMap, and the two passes.
#pragma once
#include <algorithm>
#include <vector>

#include "common.h"

namespace kd {

enum HeadReduction : int64_t { kEachHead = 0, kSumHeads = 1, kMeanHeads = 2 };

// One op and what it points to.
struct MapCall {
  AttentionMap op{};
  std::vector<int32_t> real_tokens;
  std::vector<int64_t> num_real;
  std::vector<double> partial;
};

inline ScoresView scores_view(const Tensor& x, bool reduce, const char* name) {
  STD_TORCH_CHECK(x.dim() == 4 && x.size(2) == x.size(3) && x.size(1) > 0, name, " must be [batch, heads, tokens, tokens]");
  return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2), x.stride(3), reduce ? x.size(1) : 1, dtype_of(x, name)};
}

inline MapCall describe_maps(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& mask, int64_t head_reduction,
                             double temperature, bool kl) {
  MapCall call;
  AttentionMap& op = call.op;
  const bool reduce = head_reduction != kEachHead;
  op.student = scores_view(student, reduce, "student");
  op.teacher = scores_view(teacher, reduce, "teacher");
  op.batch = student.size(0);
  op.maps = reduce ? 1 : student.size(1);
  op.tokens = student.size(2);
  op.kl = kl;
  STD_TORCH_CHECK(teacher.size(0) == op.batch && teacher.size(2) == op.tokens && (reduce || teacher.size(1) == op.maps),
                  "student and teacher must agree in batch, tokens and, unless reduced, heads");
  const bool mean = head_reduction == kMeanHeads;
  const auto scale = [&](const ScoresView& x) { return static_cast<float>(1 / (temperature * (mean ? x.heads : 1))); };
  op.scale_s = scale(op.student);
  op.scale_t = scale(op.teacher);

  const bool* is_real = mask_of(mask, op.batch * op.tokens);
  call.real_tokens.resize(op.batch * op.tokens);
  for (int64_t b = 0; b < op.batch; ++b) {
    int32_t* tokens = call.real_tokens.data() + b * op.tokens;
    int64_t n = 0;
    for (int64_t i = 0; i < op.tokens; ++i)
      if (!is_real || is_real[b * op.tokens + i]) tokens[n++] = static_cast<int32_t>(i);
    call.num_real.push_back(n);
  }
  op.real_tokens = call.real_tokens.data();
  op.num_real = call.num_real.data();
  return call;
}

// Real rows of all maps, or, squared, their real (query, key) pairs; at least 1.
inline double count_maps(const MapCall& call, bool pairs) {
  double count = 0;
  for (const int64_t n : call.num_real) count += static_cast<double>(pairs ? n * n : n);
  return std::max(count * static_cast<double>(call.op.maps), 1.0);
}

inline int64_t map_items(const AttentionMap& op) { return op.batch * op.maps * cpu::map_blocks(op.tokens); }

// The sum of row losses, added up in the items' order.
inline double run_map_forward(MapCall& call) {
  call.partial.resize(map_items(call.op));
  call.op.partial = call.partial.data();
  const cpu::Table& kernels = table();
  run_items(map_items(call.op), kernels.attention_map_scratch(call.op),
            [&](int64_t item, float* scratch) { kernels.attention_map_forward(call.op, item, scratch); });
  double total = 0;
  for (const double part : call.partial) total += part;
  return total;
}

inline Tensor run_map_backward(MapCall& call, const Tensor& student) {
  AttentionMap& op = call.op;
  Tensor gradient = new_gradient(student, student.scalar_type());
  op.grad_student = gradient.mutable_data_ptr();
  op.past_cache = past_cache(gradient.numel() * static_cast<int64_t>(gradient.element_size()));
  const cpu::Table& kernels = table();
  run_items(map_items(op), kernels.attention_map_scratch(op),
            [&](int64_t item, float* scratch) { kernels.attention_map_backward(op, item, scratch); });
  return gradient;
}

}  // namespace kd
