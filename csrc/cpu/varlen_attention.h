// varlen_attention: how the work is cut into items.
#pragma once
#include <cstdint>

#include "../ops/varlen_attention.h"

namespace kd::cpu {

constexpr int64_t kQueryBlock = 192;  // queries of an item: whole tiles of every ISA

// One item = a block of queries of one head of one sequence; those behind a shorter sequence's end have nothing to do.
static inline int64_t varlen_attention_items(const VarlenAttention& op) {
  return op.sequences * op.heads * ((op.longest + kQueryBlock - 1) / kQueryBlock);
}

}  // namespace kd::cpu
