// The CUDA kernels of csrc/cuda, run on the CPU behind C functions that test_cuda_host.py calls through ctypes.
#include "../../csrc/cuda/kd_loss.cu"
#include "../../csrc/cuda/status.cu"

namespace {

// Half of the block never comes to the barrier; half of the warp never comes to the shuffle.
__global__ void diverge_at_barrier(int) {
  if (threadIdx.x < 32) __syncthreads();
}

__global__ void diverge_at_shuffle(int) {
  if (threadIdx.x % 2) __shfl_xor_sync(0xffffffffu, 1.f, 1);
}

}  // namespace

extern "C" {

int64_t host_sizeof_kd_loss() { return sizeof(kd::KdLoss); }
int64_t host_workspace_bytes(const kd::KdLoss* op) { return kd::cuda::kd_loss_workspace_bytes(*op); }
int host_forward(const kd::KdLoss* op, void* workspace) { return kd::cuda::kd_loss_forward(*op, workspace, nullptr); }
int host_backward(const kd::KdLoss* op) { return kd::cuda::kd_loss_backward(*op, nullptr); }
int host_diverge(int at_shuffle) {
  return kd::cuda::launch(at_shuffle ? diverge_at_shuffle : diverge_at_barrier, 1, 64, nullptr, 0);
}
const char* host_status_text(int status) { return kd::cuda::status_text(status); }
void host_to_float(const void* x, float* out, int64_t n, int is_half) {
  for (int64_t i = 0; i < n; ++i) {
    out[i] = is_half ? __half2float(static_cast<const __half*>(x)[i]) : __bfloat162float(static_cast<const __nv_bfloat16*>(x)[i]);
  }
}
void host_from_float(const float* x, void* out, int64_t n, int is_half) {
  for (int64_t i = 0; i < n; ++i) {
    if (is_half) {
      static_cast<__half*>(out)[i] = __float2half_rn(x[i]);
    } else {
      static_cast<__nv_bfloat16*>(out)[i] = __float2bfloat16_rn(x[i]);
    }
  }
}
void host_reverse_threads(bool reversed) { host_threads_reversed = reversed; }

}  // extern "C"
