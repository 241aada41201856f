// varlen_attention on CUDA: its launcher, a stream in, a status out (0, or a cudaError_t). Nothing waits for the device.
//
// cu_seqlens lies on the device and is not looked at by the host: cu_seqlens[sequences] may be less than `tokens`, and rows from there on
// are room for more, neither read nor written. `longest` is not used. q, k and v have one dtype; out may take q's place.
#pragma once
#include "../ops/varlen_attention.h"

namespace kd::cuda {

constexpr int kMostHeadSize = 128;

int varlen_attention(const VarlenAttention& op, void* stream);

}  // namespace kd::cuda
