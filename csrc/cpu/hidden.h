// What the CPU adds to the contract of the losses on hidden states: how tokens are grouped into work items, and a worker's memory.
#pragma once
#include "../ops/hidden.h"

namespace kd::cpu {

// Tokens per work item: enough to outweigh handing out the item. It depends on the shape alone, and so does the order of additions.
static inline int64_t hidden_tokens_per_item(int64_t features) { return features >= 16384 ? 1 : 16384 / features; }

// Floats of one row in scratch, rounded up so that the next row is aligned.
static inline int64_t hidden_row_floats(int64_t features) { return (features + 15) / 16 * 16; }

// A worker holds one row of either side.
static inline int64_t hidden_scratch(const HiddenLayers& op) {
  int64_t widest = 0;
  for (int64_t l = 0; l < op.num_layers; ++l)
    if (op.layers[l].features > widest) widest = op.layers[l].features;
  return 2 * hidden_row_floats(widest);
}

}  // namespace kd::cpu
