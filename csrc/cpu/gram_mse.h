// What the CPU adds to gram_mse's contract: the blocks of its work items.
#pragma once
#include "../ops/gram_mse.h"

namespace kd::cpu {

// Rows of a Gram matrix's tile, whole tiles and panels of gemm.inl on every ISA: its operands fit into an L2 cache of 2 MiB up to 768
// features, and packing them is small beside their product.
constexpr int64_t kGramBlock = 192;

static inline int64_t gram_blocks(int64_t rows) { return (rows + kGramBlock - 1) / kGramBlock; }

}  // namespace kd::cpu
