// What the CPU adds to hidden_mse's contract: how tokens are grouped into work items, and the workspace of a worker.
#pragma once
#include "../ops/hidden_mse.h"

namespace kd::cpu {

// Tokens per work item: enough to outweigh handing out the item. It depends on the shape alone, and so does the order of additions.
static inline int64_t hidden_tokens_per_item(int64_t features) { return features >= 16384 ? 1 : 16384 / features; }

// Floats of one row in scratch, rounded up so that the next row is aligned.
static inline int64_t hidden_row_floats(int64_t features) { return (features + 15) / 16 * 16; }

// Without a projection a worker holds one row of either side.
static inline int64_t hidden_scratch(const HiddenMse& op) {
  int64_t widest = 0;
  for (int64_t l = 0; l < op.num_layers; ++l)
    if (op.layers[l].features > widest) widest = op.layers[l].features;
  return 2 * hidden_row_floats(widest);
}

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
