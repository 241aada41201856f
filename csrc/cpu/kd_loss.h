// What the CPU adds to kd_loss's contract: how rows are grouped into work items, and the weights of the two terms.
#pragma once
#include "../ops/kd_loss.h"

namespace kd::cpu {

// d(loss) / d(row's soft term), d(loss) / d(row's cross-entropy), for an upstream gradient of 1.
struct KdWeights {
  float soft, hard;
};

// Rows per work item: enough to outweigh handing out the item. Static, because the objects of all ISAs include it, and the linker
// would merge their copies.
static inline int64_t kd_rows_per_item(const KdLoss& op) { return op.classes >= 16384 ? 1 : op.classes <= 16 ? 1024 : 16384 / op.classes; }

}  // namespace kd::cpu
