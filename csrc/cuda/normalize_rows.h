// normalize_rows on CUDA: a stream in, a status out (0, or a cudaError_t).
#pragma once
#include "../ops/encoder.h"
#include "../ops/quant_linear.h"

namespace kd::cuda {

// `next`: the linear layer that reads the result, whose codes, scales and sums are made too; null: none. Up to kMaxColumns columns.
int normalize_rows(const NormalizeRows& op, const QuantLinear* next, void* stream);

}  // namespace kd::cuda
