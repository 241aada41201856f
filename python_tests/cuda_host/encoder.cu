// The CUDA sources of the encoder that quant_linear.cu here does not have, run on the CPU behind C functions that encoder.py calls.
#include "../../csrc/cuda/encoder.cu"
#include "../../csrc/cuda/normalize_rows.cu"
#include "../../csrc/cuda/varlen_attention.cu"

using namespace kd;

extern "C" {

int64_t host_sizeof_normalize_rows() { return sizeof(NormalizeRows); }
int64_t host_sizeof_encoder() { return sizeof(cuda::Encoder); }

int host_normalize_rows(const NormalizeRows* op, const QuantLinear* next) { return cuda::normalize_rows(*op, next, nullptr); }

int host_varlen_attention(const VarlenAttention* op) { return cuda::varlen_attention(*op, nullptr); }

int64_t host_encoder_workspace_bytes(const cuda::Encoder* op) { return cuda::encoder_workspace_bytes(*op); }
int host_encoder(const cuda::Encoder* op, void* workspace) { return cuda::encoder(*op, workspace, nullptr); }

}  // extern "C"
