// quant_linear on CUDA where time is the weights' bytes: 8-bit activations of few rows, and weight-only schemes (of many rows in 16
// bits: quant_unpack.cu).
//
// A block of 8 warps has one panel of 64 output features and 16 or 32 rows; its warps take turns at 128 columns each, and where panels are
// few, the columns are split among blocks too. Weights go from memory into the registers that multiply them: the order of columns within
// a product is free, so each lane has a run of 32 columns to itself, whose codes are one read of 16 bytes at 4 bits, and one step. (At 8
// bits a lane has 8 columns of each of 4 runs, since runs may have scales of their own.)
//
// Weight-only: weights are integers that bf16 and fp16 hold exactly, and products add up in fp32, so only the activations' own type rounds.
// Scales come behind the sums, so activations beyond 2^120 would overflow before them.
// Where x is float32, or multiplied by scales of columns, it is the sum of three bf16, exactly, and there are three products. This way
// serves zeros, scales that change along the columns, and x in any strides too. On sm_75, which has no products of bf16, float takes
// the place of both, without tensor cores.
//
// Warps' sums are added in a tree, splits' in order by a second kernel: the same bits on every run.
//
// 4096 x 4096 in 4 bits are 8.9 MB, 1.9 us at 4.8 TB/s, where bf16 takes 7 us. Unpacking takes 2.2 instructions a weight, as long on
// 132 multiprocessors as the bytes of 3 bits.
#include "epilogue.h"
#include "launch.h"
#include "mma.h"
#include "quant_linear.h"
#include "unpack.h"

namespace kd::cuda {
namespace few {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * 32;
constexpr int kUnit = 2 * kTileColumns;       // columns that a warp takes at a time
constexpr int kGroups = 8;                    // of 4 columns, of each lane
constexpr int kFragments = kPanelRows / 8;    // of 8 output features
constexpr int kSumStride = kPanelRows + 8;    // rows of sums 8 banks apart
constexpr int kEnoughBlocks = 264;            // for two on each multiprocessor of the largest GPUs
constexpr int kAddThreads = 128;
constexpr int kManyTiles = 2;                 // of 16 rows, where there are more than 16: they share the unpacked weights

// T: what is multiplied, x as kParts of it; kSegments: scales change along the columns, zeros may. float is for GPUs that lack bf16.
template <int kBits_, class T_, int kParts_, int kRowTiles_, bool kSegments_ = false>
struct Shape {
  using T = T_;
  static constexpr int kBits = kBits_, kParts = kParts_, kRowTiles = kRowTiles_, kRows = kRowTiles * 16;
  static constexpr bool kSegments = kSegments_, kInteger = std::is_same<T, int8_t>::value, kFloat = std::is_same<T, float>::value;
  static constexpr bool kAnyX = kParts > 1 || kFloat;  // of any type and strides
  static constexpr bool kRuns = kFloat ? !kSm80 : kSm80 || !std::is_same<T, __nv_bfloat16>::value;
  using Sum = typename std::conditional<kInteger, int32_t, float>::type;
  using A = typename std::conditional<kFloat, float[4][2], uint32_t[4]>::type;  // operands of one product
  using B = typename std::conditional<kFloat, float[2][2], uint32_t[2]>::type;
  static constexpr int kBlocks = kParts * kRowTiles == 1 && kBits < 8 && !kFloat ? 2 : 1;  // that a multiprocessor shall hold
  static constexpr int kGroupsAtOnce = kInteger ? 2 : 1;  // of a product: 32 columns or 16, a quarter per lane
  static constexpr int kSharedBytes = kWarps / 2 * kRows * kSumStride * 4;
};

struct Split {
  int64_t row_blocks, splits;
  float* sums;  // [splits][rows][panels * 64], float or int32; null where there is one split
};

template <int kCount>
struct alignas(kCount % 4 == 0 ? 16 : kCount % 2 == 0 ? 8 : 4) Words {
  uint32_t at[kCount];
};

template <int kCount>
__device__ void read(const uint8_t* from, uint32_t* to) {
  const auto words = *reinterpret_cast<const Words<kCount>*>(from);
#pragma unroll
  for (int i = 0; i < kCount; ++i) to[i] = words.at[i];
}

// A lane's codes of one output feature and 32 columns.
template <int kBits>
struct Codes {
  uint32_t words[kBits], step;

  // `tile` is the first of the unit, of which `tiles` exist.
  __device__ void load(const uint8_t* tile, int64_t tiles, int row, int thread) {
    if constexpr (kBits == 8) {
#pragma unroll
      for (int run = 0; run < 4; ++run) {
        const int chunk = (run % 2 * 2 + thread / 2) ^ row / 2 % 4;
        words[2 * run] = words[2 * run + 1] = 0;
        if (run / 2 < tiles) read<2>(tile + run / 2 * kTileBytes<8> + row * kTileColumns + chunk * 16 + thread % 2 * 8, words + 2 * run);
      }
    } else {
      const uint8_t* own = tile + thread / 2 * kTileBytes<kBits>;
      const int at = thread % 2 * kPanelRows + row;
#pragma unroll
      for (int i = 0; i < kBits; ++i) words[i] = 0;
      step = 0;  // a weight of 0
      if (thread / 2 >= tiles) return;
      read<kBits>(own + at * 4 * kBits, words);
      step = own[kCodeBytes<kBits> + at];
    }
  }

  // The four codes of a group, one in each byte; at 8 bits the weights themselves.
  __device__ uint32_t group(int s) const {
    if constexpr (kBits == 8) return words[s];
    if constexpr (kBits == 4) return words[s % 4] >> (s / 4 * 4) & 0x0f0f0f0fu;
    const uint32_t low = words[s % 2] >> (s / 2 * 2) & 0x03030303u;
    if constexpr (kBits == 3) return low | (words[2] >> s & 0x01010101u) << 2;
    return low;
  }
};

// The first of the 4 columns of a lane's group, in its unit.
template <int kBits>
__device__ int group_column(int thread, int s) {
  return kBits == 8 ? s / 2 * 32 + thread * 8 + s % 2 * 4 : thread * 32 + s * 4;
}

// What makes weights of codes below 8 bits: step and offset, for scale_codes or as pairs.
struct Step {
  uint32_t step, offset;
};

template <class S>
__device__ Step unpack_step(uint32_t both) {
  const uint32_t step = both & ((1u << (8 - S::kBits)) - 1), zero = (both >> (8 - S::kBits)) + (1u << (S::kBits - 1));
  const uint32_t offset = step * zero >> 1;
  if constexpr (S::kInteger) return {step, (128u - offset) * 0x01010101u};
  if constexpr (S::kFloat) return {step, offset};
  const float minus = -static_cast<float>(offset);
  return {pair<typename S::T>(step, step), pair<typename S::T>(minus, minus)};
}

// The operand b of a product from group s on. Of floats the first register has the group's columns 0 and 2, the second 1 and 3.
template <class S>
__device__ void load_b(const Codes<S::kBits>& codes, const Step& step, int s, typename S::B& b) {
  if constexpr (S::kFloat) {
    const uint32_t word = codes.group(s);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const uint32_t code = word >> 8 * k & 0xff;
      b[k % 2][k / 2] = S::kBits == 8 ? static_cast<int8_t>(code) : static_cast<int32_t>(code * step.step - step.offset);
    }
  } else if constexpr (S::kInteger) {
#pragma unroll
    for (int i = 0; i < 2; ++i) b[i] = S::kBits == 8 ? codes.group(s + i) : scale_codes(codes.group(s + i), step.step, step.offset);
  } else {
    using T = typename S::T;
    const uint32_t word = S::kBits == 8 ? codes.group(s) ^ 0x80808080u : codes.group(s);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t both = word >> 8 * i & 0x00ff00ffu;
      b[i] = S::kBits == 8 ? int8_pair<T>(both) : fma_pair<T>(small_pair<T>(both), step.step, step.offset);
    }
  }
}

// Takes zero * column_zero off the weights of a group.
template <class S>
__device__ void subtract_zeros(const QuantWeights& w, int64_t feature, int64_t column, typename S::B& b) {
  if (column >= w.columns) return;
  const int64_t segment = w.segments > 1 ? column / w.segment : 0;
  const int32_t zero = w.zeros[segment * w.panels * kPanelRows + feature];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int32_t zeros[] = {zero * w.column_zeros[column + i], zero * w.column_zeros[column + i + 2]};
    if constexpr (S::kFloat) {
      b[i][0] -= zeros[0], b[i][1] -= zeros[1];
    } else {
      using T = typename S::T;
      b[i] = fma_pair<T>(pair<T>(zeros[0], zeros[1]), Pairs<T>::kMinusOne, b[i]);
    }
  }
}

// What a lane reads x by, or its codes: two rows of each 16. Rows behind the last read the last once more: their sums go nowhere.
template <class S>
struct XRows {
  const char* of[S::kRowTiles][2];
  int64_t stride, columns;  // behind which x is 0

  __device__ XRows(const QuantLinear& op, int64_t first, int64_t rows)
      : stride(!S::kAnyX ? 1 : op.x.stride_column), columns(S::kInteger ? op.weights.depth : op.weights.columns) {
    const int size = op.x.dtype == DType::kF32 ? 4 : 2;
#pragma unroll
    for (int i = 0; i < S::kRowTiles * 2; ++i) {
      const int64_t own = first + i * 8 + threadIdx.x % 32 / 4, row = own < rows ? own : rows - 1;
      const int64_t offset = row / op.x.inner * op.x.stride_outer + row % op.x.inner * op.x.stride_inner;
      of[i / 2][i % 2] = S::kInteger ? reinterpret_cast<const char*>(op.a) + row * columns
                                     : static_cast<const char*>(op.x.data) + offset * size;
    }
  }

  // Four columns at once, of which all or none exist, without a branch, so that reads of many columns are under way together; one by one
  // where strides may be any.
  template <class X>
  __device__ void load(int i, int half, int64_t column, X (&x)[4]) const {
    struct alignas(4 * sizeof(X)) Four {
      X at[4];
    } four = {};
    const X* from = reinterpret_cast<const X*>(of[i][half]) + column * stride;
    if constexpr (!S::kAnyX) {
      if (column < columns) four = *reinterpret_cast<const Four*>(from);
    } else {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (column + k < columns) four.at[k] = from[k * stride];
      }
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) x[k] = four.at[k];
  }
};

// The next part of x as bf16, which is cut and not rounded, so that it stays finite; x becomes the rest. What is not finite has no rest.
__device__ inline float next_part(float& x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  bits &= 0xffff0000u;
  float part;
  memcpy(&part, &bits, sizeof part);
  part = finite ? part : x;
  x = finite ? x - part : 0.f;
  return part;
}

// The operand a of 16 rows, the lane's two: a[part][0] and [2] of the first, [1] and [3] of the second, columns as in load_b.
template <class S>
__device__ void load_a(const QuantLinear& op, const XRows<S>& rows, int tile, int64_t column, int64_t next, typename S::A (&a)[S::kParts]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if constexpr (S::kInteger) {
      int8_t x[2][4];
      rows.load(tile, i, column, x[0]);
      rows.load(tile, i, next, x[1]);
      memcpy(&a[0][i], x[0], 4);
      memcpy(&a[0][i + 2], x[1], 4);
    } else if constexpr (!S::kAnyX) {
      typename S::T x[4];
      rows.load(tile, i, column, x);
      const typename S::T even[] = {x[0], x[2]}, odd[] = {x[1], x[3]};
      memcpy(&a[0][i], even, 4);
      memcpy(&a[0][i + 2], odd, 4);
    } else {
      float x[4];
      with_type(op.x.dtype, [&](auto type) {
        decltype(type) values[4];
        rows.load(tile, i, column, values);
#pragma unroll
        for (int k = 0; k < 4; ++k) x[k] = to_float(values[k]);
      });
      if (op.weights.column_scales != nullptr && column < op.weights.columns) {
#pragma unroll
        for (int k = 0; k < 4; ++k) x[k] *= op.weights.column_scales[column + k];
      }
      if constexpr (S::kFloat) {
#pragma unroll
        for (int k = 0; k < 4; ++k) a[0][k % 2 * 2 + i][k / 2] = x[k];
      } else {
#pragma unroll
        for (int part = 0; part < S::kParts; ++part) {
          float y[4];
#pragma unroll
          for (int k = 0; k < 4; ++k) y[k] = next_part(x[k]);
          a[part][i] = pair<typename S::T>(y[0], y[2]);
          a[part][i + 2] = pair<typename S::T>(y[1], y[3]);
        }
      }
    }
  }
}

template <class S, class V>
using Sums = V[S::kRowTiles][kFragments][4];

// Adds sums times their scales to the total, of a panel in the segment that it counts among, and starts sums again.
template <class S>
__device__ void scale_sums(const QuantWeights& w, int64_t panel_of_segment, Sums<S, float>& sums, Sums<S, float>& total) {
  const float* scales = w.scales + panel_of_segment * kPanelRows + threadIdx.x % 4 * 2;
#pragma unroll
  for (int i = 0; i < S::kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < kFragments; ++j) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        total[i][j][r] += sums[i][j][r] * scales[j * 8 + r % 2];
        sums[i][j][r] = 0;
      }
    }
  }
}

// Multiplies a unit of columns and adds to the sums; of segments, to the total.
template <class S>
__device__ void multiply_unit(const QuantLinear& op, const XRows<S>& rows, int64_t panel, int64_t unit,
                              Sums<S, typename S::Sum>& sums, Sums<S, float>& total) {
  const QuantWeights& w = op.weights;
  const int group = threadIdx.x % 32 / 4, thread = threadIdx.x % 4;
  const int64_t tiles = w.depth / kTileColumns;
  const uint8_t* tile = w.codes + (panel * tiles + unit * 2) * kTileBytes<S::kBits>;
  Codes<S::kBits> codes[kFragments];
#pragma unroll
  for (int j = 0; j < kFragments; ++j) codes[j].load(tile, tiles - unit * 2, j * 8 + group, thread);
  Step steps[kFragments] = {};
  if constexpr (S::kBits < 8) {
#pragma unroll
    for (int j = 0; j < kFragments; ++j) steps[j] = unpack_step<S>(codes[j].step);
  }
#pragma unroll
  for (int s = 0; s < kGroups; s += S::kGroupsAtOnce) {
    const int64_t column = unit * kUnit + group_column<S::kBits>(thread, s), next = unit * kUnit + group_column<S::kBits>(thread, s + 1);
    typename S::A a[S::kRowTiles][S::kParts];
#pragma unroll
    for (int i = 0; i < S::kRowTiles; ++i) load_a<S>(op, rows, i, column, next, a[i]);
#pragma unroll
    for (int j = 0; j < kFragments; ++j) {
      typename S::B b;
      load_b<S>(codes[j], steps[j], s, b);
      if constexpr (S::kAnyX) {
        if (w.zeros != nullptr) subtract_zeros<S>(w, panel * kPanelRows + j * 8 + group, column, b);
      }
#pragma unroll
      for (int i = 0; i < S::kRowTiles; ++i) {
#pragma unroll
        for (int part = 0; part < S::kParts; ++part) {
          if constexpr (S::kInteger) {
            mma<int8_t, int8_t>(sums[i][j], a[i][part], b);
          } else if constexpr (S::kFloat) {
            multiply_floats(sums[i][j], a[i][part], b);
          } else {
            mma<typename S::T>(sums[i][j], a[i][part], b);
          }
        }
      }
    }
    if constexpr (S::kSegments) {
      if (s % 2 == 0) continue;
      const int64_t first = unit * kUnit + s / 2 * kCodeRun;  // of a run, of which the unit may have more than there are
      scale_sums<S>(w, (first < w.columns ? first / w.segment : 0) * w.panels + panel, sums, total);
    }
  }
}

// The lane's own places among the rows and features of its block.
template <class S, class Use>
__device__ void each_sum(Use use) {
#pragma unroll
  for (int i = 0; i < S::kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < kFragments; ++j) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        use(i, j, r, (i * 16 + threadIdx.x % 32 / 4 + r / 2 * 8) * kSumStride + j * 8 + threadIdx.x % 4 * 2 + r % 2);
      }
    }
  }
}

// Adds up what the warps have; the sum lies in shared memory, for all.
template <class S, class V>
__device__ void add_warps(Sums<S, V>& sums, V* shared) {
  const int warp = threadIdx.x / 32;
#pragma unroll
  for (int half = kWarps / 2; half > 0; half /= 2) {
    V* place = shared + warp % half * S::kRows * kSumStride;
    if (warp >= half && warp < 2 * half) each_sum<S>([&](int i, int j, int r, int at) { place[at] = sums[i][j][r]; });
    __syncthreads();
    if (warp < half) each_sum<S>([&](int i, int j, int r, int at) { sums[i][j][r] += load_shared<V>(place + at); });
    __syncthreads();
  }
  if (warp == 0) each_sum<S>([&](int i, int j, int r, int at) { shared[at] = sums[i][j][r]; });
  __syncthreads();
}

// The block's sums to the output, or to their split's.
template <class S, class V>
__device__ void finish(const QuantLinear& op, const Split& split, int64_t index, int64_t panel, int64_t first_row, int64_t rows,
                       const V* shared) {
  constexpr int kChunks = kPanelRows / kChunk;
  for (int i = threadIdx.x; i < S::kRows * kChunks; i += kThreads) {
    const int64_t row = first_row + i / kChunks, column = panel * kPanelRows + i % kChunks * kChunk;
    if (row >= rows || column >= op.weights.rows) continue;
    V sums[kChunk];
#pragma unroll
    for (int k = 0; k < kChunk; ++k) sums[k] = load_shared<V>(shared + i / kChunks * kSumStride + i % kChunks * kChunk + k);
    if (split.sums == nullptr) {
      write_outputs(op, row, column, sums);
    } else {
      auto to = reinterpret_cast<Words<4>*>(split.sums + (index * op.rows + row) * op.weights.panels * kPanelRows + column);
      memcpy(to, sums, 16);
      memcpy(to + 1, sums + 4, 16);
    }
  }
}

template <class S>
__global__ void __launch_bounds__(kThreads, S::kBlocks) multiply(QuantLinear op, Split split) {
  if constexpr (!S::kRuns) return;
  const QuantWeights& w = op.weights;
  const int64_t panel = blockIdx.x % w.panels, index = blockIdx.x / w.panels % split.splits;
  const int64_t first_row = blockIdx.x / (w.panels * split.splits) * S::kRows, rows = rows_in_use(op.rows, op.in_use);
  if (first_row >= rows) return;
  const XRows<S> x(op, first_row, rows);
  const int64_t units = (w.depth + kUnit - 1) / kUnit, of_split = (units + split.splits - 1) / split.splits;
  const int64_t end = (index + 1) * of_split < units ? (index + 1) * of_split : units;
  Sums<S, typename S::Sum> sums = {};
  Sums<S, float> total = {};
  for (int64_t unit = index * of_split + threadIdx.x / 32; unit < end; unit += kWarps) multiply_unit<S>(op, x, panel, unit, sums, total);
  if constexpr (!S::kInteger) {
    if constexpr (!S::kSegments) scale_sums<S>(w, panel, sums, total);
    auto shared = reinterpret_cast<float*>(dynamic_shared());
    add_warps<S>(total, shared);
    finish<S>(op, split, index, panel, first_row, rows, shared);
  } else {
    auto shared = reinterpret_cast<int32_t*>(dynamic_shared());
    add_warps<S>(sums, shared);
    finish<S>(op, split, index, panel, first_row, rows, shared);
  }
}

// Adds up the splits' sums, of V = int32_t or float, and writes the outputs.
template <class V>
__global__ void __launch_bounds__(kAddThreads, 8) add_splits(QuantLinear op, Split split) {
  const int64_t features = op.weights.panels * kPanelRows, chunks = (op.weights.rows + kChunk - 1) / kChunk;
  const int64_t at = int64_t(blockIdx.x) * kAddThreads + threadIdx.x, row = at / chunks, column = at % chunks * kChunk;
  if (row >= rows_in_use(op.rows, op.in_use)) return;
  V sums[kChunk] = {};
  for (int64_t index = 0; index < split.splits; ++index) {
    const auto from = reinterpret_cast<const Words<4>*>(split.sums + (index * op.rows + row) * features + column);
    const Words<4> parts[] = {from[0], from[1]};
    V more[kChunk];
    memcpy(more, parts, sizeof more);
#pragma unroll
    for (int k = 0; k < kChunk; ++k) sums[k] += more[k];
  }
  write_outputs(op, row, column, sums);
}

template <class S>
int run(const QuantLinear& op, const Split& split, void* stream) {
  const int64_t blocks = op.weights.panels * split.splits * split.row_blocks;
  const int64_t added = op.rows * ((op.weights.rows + kChunk - 1) / kChunk), add_blocks = (added + kAddThreads - 1) / kAddThreads;
  if (blocks > INT32_MAX || add_blocks > INT32_MAX) return cudaErrorInvalidValue;
  const int status = launch_shared(multiply<S>, blocks, kThreads, S::kSharedBytes, stream, op, split);
  if (status != cudaSuccess || split.sums == nullptr) return status;
  return launch(add_splits<typename S::Sum>, add_blocks, kAddThreads, stream, op, split);
}

// Whether x is multiplied as it is, four columns a read.
bool in_one_part(const QuantLinear& op) {
  const QuantWeights& w = op.weights;
  const bool multiplied = op.x.dtype == DType::kF16 || (op.x.dtype == DType::kBF16 && has_sm80());
  const bool exact = multiplied && w.zeros == nullptr && w.column_scales == nullptr && w.segments == 1;
  const bool grid = reinterpret_cast<uintptr_t>(op.x.data) % 8 == 0 && op.x.stride_outer % 4 == 0 && op.x.stride_inner % 4 == 0;
  return exact && grid && op.x.stride_column == 1 && w.columns % 4 == 0;
}

// Row tiles of a block: more of them share an unpacked weight.
int row_tiles(const QuantLinear& op, bool quantized) { return quantized || op.rows <= 16 || !in_one_part(op) ? 1 : kManyTiles; }

Split split_of(const QuantLinear& op, bool quantized, float* sums) {
  const int64_t row_blocks = (op.rows + row_tiles(op, quantized) * 16 - 1) / (row_tiles(op, quantized) * 16);
  const int64_t wanted = (kEnoughBlocks + row_blocks * op.weights.panels - 1) / (row_blocks * op.weights.panels);
  const int64_t units = (op.weights.depth + kUnit - 1) / kUnit, most = (units + kWarps - 1) / kWarps;
  const int64_t of_split = (units + (wanted < most ? wanted : most) - 1) / (wanted < most ? wanted : most);
  const int64_t splits = (units + of_split - 1) / of_split;
  return {row_blocks, splits, splits > 1 ? sums : nullptr};
}

template <int kBits>
int run_bits(const QuantLinear& op, bool quantized, const Split& split, void* stream) {
  if (quantized) return run<Shape<kBits, int8_t, 1, 1>>(op, split, stream);
  if (!in_one_part(op)) {
    return has_sm80() ? run<Shape<kBits, __nv_bfloat16, 3, 1, kBits == 8>>(op, split, stream)
                      : run<Shape<kBits, float, 1, 1, kBits == 8>>(op, split, stream);
  }
  if (op.x.dtype == DType::kF16) {
    return op.rows <= 16 ? run<Shape<kBits, __half, 1, 1>>(op, split, stream) : run<Shape<kBits, __half, 1, kManyTiles>>(op, split, stream);
  }
  return op.rows <= 16 ? run<Shape<kBits, __nv_bfloat16, 1, 1>>(op, split, stream)
                       : run<Shape<kBits, __nv_bfloat16, 1, kManyTiles>>(op, split, stream);
}

}  // namespace
}  // namespace few

bool quant_few_rows_serves(const QuantLinear& op, bool quantized) {
  return !quantized || (op.rows <= 16 && op.weights.segments == 1);
}

int64_t quant_few_rows_bytes(const QuantLinear& op, bool quantized) {
  const int64_t splits = few::split_of(op, quantized, nullptr).splits;
  return splits > 1 ? splits * op.rows * op.weights.panels * kPanelRows * 4 : 0;
}

int quant_few_rows(const QuantLinear& op, bool quantized, float* sums, void* stream) {
  if (op.rows == 0) return cudaSuccess;
  const few::Split split = few::split_of(op, quantized, sums);
  switch (op.weights.bits) {
    case 8: return few::run_bits<8>(op, quantized, split, stream);
    case 4: return few::run_bits<4>(op, quantized, split, stream);
    case 3: return few::run_bits<3>(op, quantized, split, stream);
    case 2: return few::run_bits<2>(op, quantized, split, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace kd::cuda
