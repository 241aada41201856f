// What the CPU adds to hidden_mse's contract where there is a projection: the blocks of its work items and its workspaces.
#pragma once
#include "../ops/hidden_mse.h"

namespace kd::cpu {

// With a projection: rows of the weight, real tokens, or rows of the weight's gradient per work item. A multiple of kRowPad; an item reads
// the whole other operand, which 96 rows outweigh, and 768 features make eight items.
constexpr int64_t kProjectionBlock = 96;

// The workspaces that a projection needs, in floats.
struct ProjectionFloats {
  int64_t packed_weight, packed_rows, scratch;
};

static inline int64_t projection_blocks(int64_t n) { return (n + kProjectionBlock - 1) / kProjectionBlock; }

// At least one, which zeroes the gradient of a batch without a real token.
static inline int64_t projection_row_blocks(int64_t rows) { return rows > 0 ? projection_blocks(rows) : 1; }

}  // namespace kd::cpu
