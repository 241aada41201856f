// What the CPU adds to hidden_mse's contract where there is a projection: the blocks of its work items and its workspaces.
#pragma once
#include "../ops/hidden_mse.h"

namespace kd::cpu {

// How a projection is run: rows of the weight, real tokens, or rows of the weight's gradient per work item, which is the ISA's choice
// alone, and the workspaces that it needs, in floats.
struct ProjectionPlan {
  int64_t block, packed_weight, packed_rows, scratch;
};

static inline int64_t projection_blocks(int64_t n, int64_t block) { return (n + block - 1) / block; }

// At least one, which zeroes the gradient of a batch without a real token.
static inline int64_t projection_row_blocks(int64_t rows, int64_t block) { return rows > 0 ? projection_blocks(rows, block) : 1; }

}  // namespace kd::cpu
