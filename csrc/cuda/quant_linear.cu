// quant_linear on CUDA: y = activation(x W^T + bias) + residual on the tensor cores' 8-bit integers, exact in int32.
//
// A block of 4 warps computes kM rows by kN output features, a quarter per warp, over all columns. Tiles of 64 columns of both sides
// come by cp.async, kStages deep, one barrier a tile. A warp's 64 x 64 reads 4 KB of shared memory for 32 products of 16 x 8 x 32: at the
// multiplication's full rate that is all that shared memory gives, and with a warp tile half as large it would be too little. Weights below
// 8 bits become int8 in registers: word of codes, mask, one multiplication by the step with the offset added, one xor.
//
// On sm_75, where copies are the threads' own and a block has 64 KB, two tiles are there at a time, and two blocks of a multiprocessor wait
// for memory in turn.
//
// The sums then cross shared memory, so that scales, bias, activation and residual are applied where a thread has 8 neighbouring columns:
// 16-byte reads and writes.
//
// Where rows are few, tiles are small and kGroups groups of 4 warps take turns at the tiles of columns; their sums, integers, are added
// where they cross shared memory, the same bits in any order. A second kernel, or counters in memory, would cost a launch each.
//
// 4096 x 3072 x 768 are 19.3 G operations, 9.8 us at the 1979 TOPS of an H200; reading and writing, 31 MB in bf16, are 6.4 us.
// 128 rows of BERT-base on its 132 multiprocessors, at 64 bytes a clock of each from the second-level cache, and 1 us until the first
// bytes come; in brackets what 64 x 64 without groups would take, a tile of columns every 300 clocks:
//   3 x 768 x 768   144 blocks, 3 turns, 74 KB each, 2.3 us (3.1)      3072 x 768      192 blocks, 3 turns, 74 KB, 2.3 us (3.1)
//   768 x 768        48 blocks, 3 turns, 74 KB each, 1.7 us (3.1)      768 x 3072       48 blocks, 12 turns, 295 KB, 3.6 us (9.2)
#include "quant_linear.h"

#include "epilogue.h"
#include "launch.h"
#include "mma.h"
#include "unpack.h"

namespace kd::cuda {
namespace {

constexpr int stages(bool sm80) { return sm80 ? 4 : 2; }

constexpr int kStages = stages(kSm80), kGroupThreads = 128, kChunkBytes = 16;
constexpr int kFewBlocks = 128;  // below that many, larger tiles leave multiprocessors idle

// kSegments: scales change along the columns, so that sums are scaled and added up in fp32 as they come.
template <int kBits_, int kM_, int kN_, int kGroups_ = 1, bool kSegments_ = false>
struct Shape {
  static constexpr int kBits = kBits_, kM = kM_, kN = kN_, kGroups = kGroups_, kThreads = kGroups * kGroupThreads;
  static constexpr bool kSegments = kSegments_;
  static constexpr int kFragmentsM = kM / 32, kFragmentsN = kN / 16;  // 16 x 8 each, of a warp
  static constexpr int kPanels = kN / kPanelRows;
  static constexpr int kBlocks = kM == 64 ? (kSegments ? 3 : 5) : 2;  // that a multiprocessor shall hold, by their registers
  static constexpr int kStageBytes = kM * kTileColumns + kPanels * kTileBytes<kBits>;  // of a group
  static constexpr int kSumStride = kN + 8;  // rows of sums 8 banks apart: the lanes of a fragment meet none twice
  // Sums cross shared memory all at once or, where a block has little of it, 32 rows at a time.
  static constexpr int sum_rows(bool sm80) { return sm80 ? kM : 32; }
  static constexpr int group_bytes(bool sm80) {
    const int tiles = stages(sm80) * kStageBytes, sums = sum_rows(sm80) * kSumStride * 4;
    return tiles > sums ? tiles : sums;
  }
  static constexpr int kGroupBytes = group_bytes(kSm80);
  static constexpr int kPasses = kM / sum_rows(kSm80), kOfPass = kFragmentsM / kPasses;  // over sums; fragments of a warp's rows
  static_assert(kGroups == 1 || !kSegments);
};

// Where a 16-byte chunk of a row of 64 bytes lies.
__device__ int swizzled(int row, int chunk) { return row * kTileColumns + ((chunk ^ row / 2 % 4) * kChunkBytes); }

// Products that one launch does, alike in all but what they read and write.
struct Products {
  QuantLinear of[kMostTogether];
  unsigned blocks;  // of each
};

// The block's first row and panel, and a lane's place in its warp's part.
template <class S>
struct Place {
  int64_t rows;  // of x that count
  int64_t row, panel;
  int warps, of_warps;      // the group of 4 warps, and the thread's number in it
  int lane, group, thread;  // as the fragments of mma.h have it
  int warp_m, warp_n;

  __device__ Place(const QuantLinear& op, unsigned block) : rows(rows_in_use(op.rows, op.in_use)) {
    const int64_t row_blocks = (op.rows + S::kM - 1) / S::kM;
    row = block % row_blocks * S::kM;
    panel = block / row_blocks * S::kPanels;
    warps = S::kGroups == 1 ? 0 : threadIdx.x / kGroupThreads;
    of_warps = threadIdx.x % kGroupThreads;
    lane = threadIdx.x % 32;
    group = lane / 4;
    thread = lane % 4;
    warp_m = of_warps / 64 * (S::kM / 2);
    warp_n = of_warps / 32 % 2 * (S::kN / 2);
  }
};

// Starts the copies of one tile of columns. Rows and panels behind the last read the last once more: their sums go nowhere.
template <class S>
__device__ void load_tile(const QuantLinear& op, const Place<S>& at, int tile, char* stage) {
  const QuantWeights& w = op.weights;
#pragma unroll
  for (int i = at.of_warps; i < S::kM * 4; i += kGroupThreads) {
    const int64_t row = at.row + i / 4 < at.rows ? at.row + i / 4 : at.rows - 1;
    cp_async(stage + swizzled(i / 4, i % 4), op.a + row * w.depth + tile * kTileColumns + i % 4 * kChunkBytes);
  }
  char* to = stage + S::kM * kTileColumns;
#pragma unroll
  for (int p = 0; p < S::kPanels; ++p, to += kTileBytes<S::kBits>) {
    const int64_t panel = at.panel + p < w.panels ? at.panel + p : w.panels - 1;
    const uint8_t* from = w.codes + (panel * (w.depth / kTileColumns) + tile) * kTileBytes<S::kBits>;
#pragma unroll
    for (int i = at.of_warps * kChunkBytes; i < kTileBytes<S::kBits>; i += kGroupThreads * kChunkBytes) cp_async(to + i, from + i);
  }
}

// The weights of 8 rows and 32 columns, those from `row` of the panel's tile on.
template <int kBits>
__device__ void load_low(const char* tile, int half, int row, int thread, uint32_t (&b)[2]) {
  static_assert(kBits < 8);
  const int at = half * kPanelRows + row;
  const uint32_t both = load_shared<uint8_t>(tile + kCodeBytes<kBits> + at);
  const uint32_t step = both & ((1u << (8 - kBits)) - 1), zero = (both >> (8 - kBits)) + (1u << (kBits - 1));
  const uint32_t raised = (128u - (step * zero >> 1)) * 0x01010101u;
  const char* codes = tile + at * 4 * kBits;
  if constexpr (kBits == 4) {
    const uint32_t word = load_shared<uint32_t>(codes + thread * 4);
    b[0] = word & 0x0f0f0f0fu;
    b[1] = word >> 4 & 0x0f0f0f0fu;
  } else {
    const uint32_t word = load_shared<uint32_t>(codes + thread % 2 * 4) >> (thread / 2 * 2);
    b[0] = word & 0x03030303u;
    b[1] = word >> 4 & 0x03030303u;
  }
  if constexpr (kBits == 3) {
    const uint32_t upper = load_shared<uint32_t>(codes + 8) >> thread;
    b[0] |= (upper & 0x01010101u) << 2;
    b[1] |= (upper >> 4 & 0x01010101u) << 2;
  }
  b[0] = scale_codes(b[0], step, raised);
  b[1] = scale_codes(b[1], step, raised);
}

// The weights of 16 output features, the warp's from column n on, and 32 columns.
template <class S>
__device__ void load_weights(const Place<S>& at, const char* stage, int half, int n, uint32_t (&b)[2][2]) {
  const int column = at.warp_n + n, row = column % kPanelRows;
  const char* tile = stage + S::kM * kTileColumns + column / kPanelRows * kTileBytes<S::kBits>;
  if constexpr (S::kBits == 8) {
    uint32_t r[4];
    ldmatrix<4>(r, tile + swizzled(row + at.lane / 16 * 8 + at.lane % 8, half * 2 + at.lane / 8 % 2));
    b[0][0] = r[0], b[0][1] = r[1], b[1][0] = r[2], b[1][1] = r[3];
  } else {
    load_low<S::kBits>(tile, half, row + at.group, at.thread, b[0]);
    load_low<S::kBits>(tile, half, row + 8 + at.group, at.thread, b[1]);
  }
}

template <class S, class T>
using Sums = T[S::kFragmentsM][S::kFragmentsN][4];

// Adds the products of 32 columns of a tile, its first or second half.
template <class S>
__device__ void multiply(const Place<S>& at, const char* stage, int half, Sums<S, int32_t>& sums) {
  uint32_t a[S::kFragmentsM][4];
#pragma unroll
  for (int i = 0; i < S::kFragmentsM; ++i) {
    ldmatrix<4>(a[i], stage + swizzled(at.warp_m + i * 16 + at.lane % 16, half * 2 + at.lane / 16));
  }
#pragma unroll
  for (int j = 0; j < S::kFragmentsN; j += 2) {
    uint32_t b[2][2];
    load_weights<S>(at, stage, half, j * 8, b);
#pragma unroll
    for (int i = 0; i < S::kFragmentsM; ++i) {
      mma<int8_t, int8_t>(sums[i][j], a[i], b[0]);
      mma<int8_t, int8_t>(sums[i][j + 1], a[i], b[1]);
    }
  }
}

// Scales the sums of a segment that has ended, adds them to the total and starts again.
template <class S>
__device__ void end_segment(const QuantLinear& op, const Place<S>& at, int64_t segment, Sums<S, int32_t>& sums, Sums<S, float>& total) {
  const QuantWeights& w = op.weights;
  const int64_t first = (segment * w.panels + at.panel) * kPanelRows + at.warp_n;
#pragma unroll
  for (int i = 0; i < S::kFragmentsM; ++i) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int64_t row = at.row + at.warp_m + i * 16 + at.group + r / 2 * 8;
      const int32_t of_row = op.a_sums != nullptr && row < at.rows ? op.a_sums[row * w.segments + segment] : 0;
#pragma unroll
      for (int j = 0; j < S::kFragmentsN; ++j) {
        const int64_t column = first + j * 8 + at.thread * 2 + r % 2;
        const int32_t sum = sums[i][j][r] - (op.a_sums != nullptr ? w.zeros[column] * of_row : 0);
        total[i][j][r] += static_cast<float>(sum) * w.scales[column];
        sums[i][j][r] = 0;
      }
    }
  }
}

// A thread's sums of one pass to their places among its group's.
template <class S, class T>
__device__ void stage_sums(const Place<S>& at, int pass, const Sums<S, T>& sums, T* staged) {
#pragma unroll
  for (int i = 0; i < S::kOfPass; ++i) {
#pragma unroll
    for (int j = 0; j < S::kFragmentsN; ++j) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int m = at.warp_m / S::kPasses + i * 16 + at.group + r / 2 * 8, n = at.warp_n + j * 8 + at.thread * 2 + r % 2;
        staged[m * S::kSumStride + n] = sums[pass * S::kOfPass + i][j][r];
      }
    }
  }
}

// The block's sums of one pass, those of all groups, to the output. A pass has as many rows of either half.
template <class S, class T>
__device__ void finish(const QuantLinear& op, const Place<S>& at, int pass, const char* shared) {
  constexpr int kRows = S::kM / S::kPasses, kOfHalf = kRows / 2;
  for (int i = threadIdx.x; i < kRows * S::kN / kChunk; i += S::kThreads) {
    const int m = i / (S::kN / kChunk), n = i % (S::kN / kChunk) * kChunk;
    const int64_t row = at.row + m / kOfHalf * (S::kM / 2) + pass * kOfHalf + m % kOfHalf, column = at.panel * kPanelRows + n;
    if (row >= at.rows || column >= op.weights.rows) continue;
    T sums[kChunk] = {};
#pragma unroll
    for (int group = 0; group < S::kGroups; ++group) {
      const T* staged = reinterpret_cast<const T*>(shared + group * S::kGroupBytes) + m * S::kSumStride + n;
#pragma unroll
      for (int k = 0; k < kChunk; ++k) sums[k] += load_shared<T>(staged + k);
    }
    write_outputs(op, row, column, sums);
  }
}

// All sums, over what shared memory had before.
template <class S, class T>
__device__ void write_sums(const QuantLinear& op, const Place<S>& at, const Sums<S, T>& sums, char* shared) {
#pragma unroll
  for (int pass = 0; pass < S::kPasses; ++pass) {
    __syncthreads();
    stage_sums(at, pass, sums, reinterpret_cast<T*>(shared + at.warps * S::kGroupBytes));
    __syncthreads();
    finish<S, T>(op, at, pass, shared);
  }
}

template <class S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks) multiply_rows(const __grid_constant__ Products products) {
  char* shared = dynamic_shared();
  const QuantLinear& op = products.of[blockIdx.x / products.blocks];
  const Place<S> at(op, blockIdx.x % products.blocks);
  if (at.row >= at.rows) return;
  const int tiles = static_cast<int>(op.weights.depth / kTileColumns), turns = (tiles + S::kGroups - 1) / S::kGroups;
  char* own = shared + at.warps * S::kGroupBytes;
  const auto stage = [&](int turn) { return own + turn % kStages * S::kStageBytes; };
  const auto load = [&](int turn) {
    const int tile = turn * S::kGroups + at.warps;
    if (tile < tiles) load_tile(op, at, tile, stage(turn));
    cp_async_commit();
  };
#pragma unroll
  for (int turn = 0; turn < kStages - 1; ++turn) load(turn);
  Sums<S, int32_t> sums = {};
  Sums<S, float> total = {};
  int segment = 0;
  for (int turn = 0; turn < turns; ++turn) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // this turn's tiles have arrived for all, and all have read those whose places the next take
    load(turn + kStages - 1);
    const int tile = turn * S::kGroups + at.warps;
    if (tile >= tiles) continue;  // the last turn may not have tiles for all
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      multiply(at, stage(turn), half, sums);
      if constexpr (S::kSegments) {
        const int done = tile * kTileColumns + (half + 1) * static_cast<int>(kCodeRun);
        if (done % op.weights.segment == 0 && segment < op.weights.segments) end_segment(op, at, segment++, sums, total);
      }
    }
  }
  if constexpr (S::kSegments) {
    if (segment < op.weights.segments) end_segment(op, at, segment, sums, total);
  }
  cp_async_wait<0>();
  if constexpr (S::kSegments) {
    write_sums<S, float>(op, at, total, shared);
  } else {
    write_sums<S, int32_t>(op, at, sums, shared);
  }
}

template <class S>
int64_t blocks(const QuantLinear& op) {
  return (op.rows + S::kM - 1) / S::kM * ((op.weights.panels + S::kPanels - 1) / S::kPanels);
}

template <class S>
int run(const QuantLinear* ops, int count, void* stream) {
  const int64_t each = blocks<S>(ops[0]);
  if (each * count > INT32_MAX) return cudaErrorInvalidValue;
  Products products = {{}, static_cast<unsigned>(each)};
  for (int i = 0; i < count; ++i) products.of[i] = ops[i];
  return launch_shared(multiply_rows<S>, each * count, S::kThreads, S::kGroups * S::group_bytes(has_sm80()), stream, products);
}

template <int kBits>
int run_bits(const QuantLinear* ops, int count, void* stream) {
  using Large = Shape<kBits, 128, 128>;
  using Middle = Shape<kBits, 64, 64>;
  if (blocks<Large>(ops[0]) * count >= kFewBlocks) return run<Large>(ops, count, stream);
  if (blocks<Middle>(ops[0]) * count >= kFewBlocks) return run<Middle>(ops, count, stream);
  return run<Shape<kBits, 32, 64, 4>>(ops, count, stream);
}

}  // namespace

int quant_linear(const QuantLinear* ops, int count, void* stream) {
  if (ops[0].rows == 0) return cudaSuccess;
  if (ops[0].weights.segments > 1) return run<Shape<8, 64, 64, 1, true>>(ops, count, stream);
  switch (ops[0].weights.bits) {
    case 8: return run_bits<8>(ops, count, stream);
    case 4: return run_bits<4>(ops, count, stream);
    case 3: return run_bits<3>(ops, count, stream);
    case 2: return run_bits<2>(ops, count, stream);
  }
  return cudaErrorInvalidValue;
}

int quant_linear(const QuantLinear& op, void* stream) { return quant_linear(&op, 1, stream); }

}  // namespace kd::cuda
