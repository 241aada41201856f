// What the CPU adds to the contract of attention_map_mse and attention_map_kl: how rows are grouped into work items.
#pragma once
#include "../ops/attention_map.h"

namespace kd::cpu {

// Rows of one map per work item: enough to outweigh handing out the item. It depends on the shape alone, and so does the order of
// additions.
static inline int64_t map_rows_per_item(int64_t tokens) { return tokens == 0 || tokens >= 16384 ? 1 : 16384 / tokens; }

static inline int64_t map_blocks(int64_t tokens) {
  const int64_t rows = map_rows_per_item(tokens);
  return (tokens + rows - 1) / rows;
}

}  // namespace kd::cpu
