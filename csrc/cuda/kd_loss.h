// What kd_loss needs from CUDA: pointers and a stream in, a status out (0, or a cudaError_t). Nothing here waits for the device.
#pragma once
#include "../ops/kd_loss.h"
#include "status.h"

namespace kd::cuda {

// Bytes of scratch, 16-byte aligned, that kd_loss_forward needs; often 0.
int64_t kd_loss_workspace_bytes(const KdLoss& op);

int kd_loss_forward(const KdLoss& op, void* workspace, void* stream);
int kd_loss_backward(const KdLoss& op, void* stream);

}  // namespace kd::cuda
