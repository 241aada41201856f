// varlen_attention's CUDA sources, run on the CPU behind C functions that varlen_attention.py calls through ctypes.
#include "../../csrc/cuda/varlen_attention.cu"

extern "C" {

int64_t host_sizeof_varlen_attention() { return sizeof(kd::VarlenAttention); }
int64_t host_bank_conflicts() { return cuda_host::bank_conflicts; }
const char* host_status_text(int status) { return cudaGetErrorString(status); }
void host_reverse_threads(bool reversed) { host_threads_reversed = reversed; }
int host_varlen_attention(const kd::VarlenAttention* op) { return kd::cuda::varlen_attention(*op, nullptr); }

}  // extern "C"
