// quant_linear's CUDA sources, run on the CPU behind C functions that quant_linear.py calls through ctypes.
#include "../../csrc/cuda/quant_few_rows.cu"
#include "../../csrc/cuda/quant_linear.cu"
#include "../../csrc/cuda/quant_prepare.cu"
#include "../../csrc/cuda/quant_rows.cu"
#include "../../csrc/cuda/quant_unpack.cu"

namespace kd::cuda {
namespace {

template <int kM, int kN, int kGroups>
int run_tile(const QuantLinear& op) {
  switch (op.weights.bits) {
    case 8: return run<Shape<8, kM, kN, kGroups>>(&op, 1, nullptr);
    case 4: return run<Shape<4, kM, kN, kGroups>>(&op, 1, nullptr);
    case 3: return run<Shape<3, kM, kN, kGroups>>(&op, 1, nullptr);
    default: return run<Shape<2, kM, kN, kGroups>>(&op, 1, nullptr);
  }
}

}  // namespace
}  // namespace kd::cuda

using namespace kd;

extern "C" {

int64_t host_sizeof_quant_linear() { return sizeof(QuantLinear); }
int64_t host_bank_conflicts() { return cuda_host::bank_conflicts; }
const char* host_status_text(int status) { return cudaGetErrorString(status); }
void host_reverse_threads(bool reversed) { host_threads_reversed = reversed; }

// The size of a blob's prepared weights; negative if it is none. Fills the weights of `op`, and `prepared` where that is given.
int64_t host_prepare(const uint8_t* blob, int64_t size, uint8_t* prepared, QuantLinear* op) {
  Packed packed;
  if (parse_packed(blob, size, packed)) return -1;
  if (prepared) cuda::quant_prepare(packed, prepared);
  return cuda::quant_weights(cuda::quant_layout(packed), prepared, op->weights);
}

int host_quantize_rows(const QuantLinear* op) { return cuda::quantize_rows(*op, nullptr); }

// `tile`: 0 as the launcher chooses, else the rows of the block's tile.
int host_quant_linear(const QuantLinear* op, int tile) {
  switch (tile) {
    case 0: return cuda::quant_linear(*op, nullptr);
    case 32: return cuda::run_tile<32, 64, 4>(*op);
    case 64: return cuda::run_tile<64, 64, 1>(*op);
    default: return cuda::run_tile<128, 128, 1>(*op);
  }
}

bool host_few_rows_serves(const QuantLinear* op, bool quantized) { return cuda::quant_few_rows_serves(*op, quantized); }
int64_t host_few_rows_bytes(const QuantLinear* op, bool quantized) { return cuda::quant_few_rows_bytes(*op, quantized); }
bool host_unpack_serves(const QuantLinear* op) { return cuda::quant_unpack_serves(*op); }
int host_unpack(const QuantLinear* op, void* out) { return cuda::quant_unpack(op->weights, op->x.dtype, out, nullptr); }
int host_finish(const QuantLinear* op, const void* product) { return cuda::quant_finish(*op, product, nullptr); }
int host_few_rows(const QuantLinear* op, bool quantized, float* sums) { return cuda::quant_few_rows(*op, quantized, sums, nullptr); }

}  // extern "C"
