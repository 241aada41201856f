// quant_linear on CUDA: how weights lie for its kernels, and its launchers: a stream in, a status out (0, or a cudaError_t). Nothing here
// waits for the device.
//
// Prepared weights are the sections of `QuantWeights` without a header, each at a multiple of 64 bytes:
//   codes          per panel of 64 output features and per 64 columns one tile, which lands in shared memory as it is:
//                  8 bits  [64 rows][64 columns] of int8, code - 128; 16-byte chunk c of row r lies at c ^ (r / 2 % 4), so that
//                          ldmatrix meets no bank twice
//                  below   [2 runs of 32 columns][64 rows][4 * bits bytes], a run's bytes as in the packed format, which has the codes
//                          that one lane of mma.m16n8k32 needs in one word; then [2 runs][64 rows] steps' bytes
//   scales         [segment][panels * 64] float
//   zeros          [segment][panels * 64] int32, and column_zeros [depth] int8; only where the scheme has zeros of its own
//   column_scales  [depth] float; only for groups of columns
// `steps` and `offsets` of the struct are null: the former lie in the tiles, and activations are signed bytes here, so nothing is to be
// taken off.
#pragma once
#include "../core/packed.h"
#include "../ops/quant_linear.h"

namespace kd::cuda {

constexpr int kPanelRows = 64, kTileColumns = 64;

constexpr int code_bytes(int bits) { return kPanelRows * kTileColumns * bits / 8; }
constexpr int tile_bytes(int bits) { return code_bytes(bits) + (bits < 8 ? kPanelRows * kTileColumns / static_cast<int>(kCodeRun) : 0); }

// The same for code that runs on the device.
template <int kBits>
constexpr int kCodeBytes = code_bytes(kBits);
template <int kBits>
constexpr int kTileBytes = tile_bytes(kBits);

// What the host must know of prepared weights that lie in the device's memory.
struct QuantLayout {
  int64_t rows, columns, segment;
  int bits;
  bool has_zeros, has_column_scales;
};

QuantLayout quant_layout(const Packed& packed);

// The pointers into prepared weights that begin at `base`; returns their size.
int64_t quant_weights(const QuantLayout& layout, const uint8_t* base, QuantWeights& weights);

// From the packed format, in the host's memory, both of them.
void quant_prepare(const Packed& packed, uint8_t* prepared);

int quantize_rows(const QuantLinear& op, void* stream);
int quant_linear(const QuantLinear& op, void* stream);

// Up to kMostTogether at once: products of as many rows, with weights of one shape and one scheme.
constexpr int kMostTogether = 3;
int quant_linear(const QuantLinear* ops, int count, void* stream);

// Products whose time is the weights' bytes (quant_few_rows.cu): weight-only ones, and few rows of codes. `sums` has quant_few_rows_bytes,
// which may be 0; rows come without codes where they are not quantized.
bool quant_few_rows_serves(const QuantLinear& op, bool quantized);
int64_t quant_few_rows_bytes(const QuantLinear& op, bool quantized);
int quant_few_rows(const QuantLinear& op, bool quantized, float* sums, void* stream);

// Weight-only products of many rows in 16 bits (quant_unpack.cu): weights to [rows, columns] of bf16 or fp16, for a product that is not
// ours, and from that, [rows, weights.rows] contiguous in x's type, to the output.
bool quant_unpack_serves(const QuantLinear& op);
int quant_unpack(const QuantWeights& weights, DType dtype, void* out, void* stream);
int quant_finish(const QuantLinear& op, const void* product, void* stream);

}  // namespace kd::cuda
