// The CUDA sources of the encoder that quant_linear.cu here does not have, run on the CPU behind C functions that encoder.py calls.
#include "../../csrc/cuda/normalize_rows.cu"

using namespace kd;

extern "C" {

int64_t host_sizeof_normalize_rows() { return sizeof(NormalizeRows); }

int host_normalize_rows(const NormalizeRows* op, const QuantLinear* next) { return cuda::normalize_rows(*op, next, nullptr); }

}  // extern "C"
