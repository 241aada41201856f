// Weight-only products of many rows: the weights once as 16-bit floats, for all rows, then torch's product, which has the tensor cores' full
// rate; what follows its sums is here too.
//
// quant_few_rows unpacks a weight for every 32 rows: 4096 x 4096 in 4 bits take on paper 2.5 us each, multiplication included, on 132
// multiprocessors, while unpacking to memory and reading it back, 76 MB, take 16 us once.
#include "epilogue.h"
#include "launch.h"
#include "quant_linear.h"

namespace kd::cuda {
namespace many {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kManyRows = 256;

// The integer of column kColumn of a run of 32: step * code - offset, or at 8 bits what is stored. Bytes of codes as in core/packed.h.
template <int kBits>
__device__ int value_of(const uint32_t (&words)[kBits], int column, int step, int offset) {
  if constexpr (kBits == 8) return static_cast<int8_t>(words[column / 4] >> column % 4 * 8);
  constexpr int kLow = kBits == 4 ? 4 : 2, kLowBytes = 4 * kLow;
  const int byte = column % kLowBytes, place = column / kLowBytes;
  int code = words[byte / 4] >> (byte % 4 * 8 + place * kLow) & ((1 << kLow) - 1);
  if constexpr (kBits == 3) code |= (words[2] >> (column % 4 * 8 + column / 4) & 1) << 2;
  return step * code - offset;
}

// A thread has 32 columns of a row.
template <int kBits, class T>
__global__ void __launch_bounds__(kThreads, 4) unpack(QuantWeights w, T* out) {
  const int64_t runs = w.depth / kCodeRun, at = int64_t(blockIdx.x) * kThreads + threadIdx.x, row = at / runs, run = at % runs;
  const int64_t first = run * kCodeRun;
  if (row >= w.rows || first >= w.columns) return;
  const int in_panel = static_cast<int>(row % kPanelRows), half = static_cast<int>(run % 2);
  const uint8_t* tile = w.codes + (row / kPanelRows * (w.depth / kTileColumns) + run / 2) * kTileBytes<kBits>;
  uint32_t words[kBits];
  int step = 0, offset = 0;
  if constexpr (kBits == 8) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int chunk = (half * 2 + i / 4) ^ in_panel / 2 % 4;
      words[i] = *reinterpret_cast<const uint32_t*>(tile + in_panel * kTileColumns + chunk * 16 + i % 4 * 4);
    }
  } else {
    const int place = half * kPanelRows + in_panel, both = tile[kCodeBytes<kBits> + place];
#pragma unroll
    for (int i = 0; i < kBits; ++i) words[i] = reinterpret_cast<const uint32_t*>(tile)[place * kBits + i];
    step = both & ((1 << (8 - kBits)) - 1);
    offset = step * ((both >> (8 - kBits)) + (1 << (kBits - 1))) >> 1;
  }
  const int64_t factor = (w.segments > 1 ? first / w.segment : 0) * w.panels * kPanelRows + row;
  const float scale = w.scales[factor];
  const int zero = w.zeros != nullptr ? w.zeros[factor] : 0;
  T* of_row = out + row * w.columns;
  const bool vector = on_grid(of_row, 0);
#pragma unroll
  for (int i = 0; i < kCodeRun; i += kChunk) {
    float x[kChunk];
#pragma unroll
    for (int k = 0; k < kChunk; ++k) {
      const int64_t column = first + i + k;
      int value = value_of<kBits>(words, i + k, step, offset);
      if (w.zeros != nullptr) value -= zero * w.column_zeros[column];
      x[k] = static_cast<float>(value) * scale;
      if (w.column_scales != nullptr) x[k] *= w.column_scales[column];
    }
    store(of_row, static_cast<int>(w.columns), vector, static_cast<int>(first) + i, x);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 4) finish(QuantLinear op, const T* product) {
  const int64_t columns = op.weights.rows, chunks = (columns + kChunk - 1) / kChunk;
  const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x, row = at / chunks, first = at % chunks * kChunk;
  if (row >= op.rows) return;
  const Chunk<T> chunk = Row<T>(product + row * columns + first, 1, static_cast<int>(columns - first), 0).load(0);
  float sums[kChunk];
#pragma unroll
  for (int k = 0; k < kChunk; ++k) sums[k] = to_float(chunk.at[k]);
  write_outputs(op, row, first, sums);
}

int64_t blocks_of(int64_t items) { return (items + kThreads - 1) / kThreads; }

template <class T>
int run(const QuantWeights& w, T* out, void* stream) {
  const int64_t blocks = blocks_of(w.rows * (w.depth / kCodeRun));
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  switch (w.bits) {
    case 8: return launch(unpack<8, T>, blocks, kThreads, stream, w, out);
    case 4: return launch(unpack<4, T>, blocks, kThreads, stream, w, out);
    case 3: return launch(unpack<3, T>, blocks, kThreads, stream, w, out);
    case 2: return launch(unpack<2, T>, blocks, kThreads, stream, w, out);
  }
  return cudaErrorInvalidValue;
}

template <class T>
int run_finish(const QuantLinear& op, const void* product, void* stream) {
  const int64_t blocks = blocks_of(op.rows * ((op.weights.rows + kChunk - 1) / kChunk));
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  return launch(finish<T>, blocks, kThreads, stream, op, static_cast<const T*>(product));
}

}  // namespace
}  // namespace many

bool quant_unpack_serves(const QuantLinear& op) { return op.rows > many::kManyRows && op.x.dtype != DType::kF32; }

int quant_unpack(const QuantWeights& weights, DType dtype, void* out, void* stream) {
  return dtype == DType::kF16 ? many::run(weights, static_cast<__half*>(out), stream)
                              : many::run(weights, static_cast<__nv_bfloat16*>(out), stream);
}

int quant_finish(const QuantLinear& op, const void* product, void* stream) {
  return op.x.dtype == DType::kF16 ? many::run_finish<__half>(op, product, stream)
                                   : many::run_finish<__nv_bfloat16>(op, product, stream);
}

}  // namespace kd::cuda
