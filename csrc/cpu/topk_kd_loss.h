// What the CPU adds to topk_kd_loss's contract: how rows are grouped into work items.
#pragma once
#include "../ops/topk_kd_loss.h"

namespace kd::cpu {

static inline int64_t topk_rows_per_item(const TopkKdLoss& op) { return op.classes >= 16384 ? 1 : 16384 / op.classes; }

}  // namespace kd::cpu
