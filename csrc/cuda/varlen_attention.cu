// varlen_attention on CUDA: out = softmax(scale q k^T) v of each head of sequences that lie end to end, on tensor cores.
//
// A block of 4 warps has 64 queries of one head, 16 a warp, and takes 64 keys at a time (FlashAttention-2, arXiv 2307.08691): the next
// keys and values come by cp.async while these are multiplied, and scores, exponentials and the sum of values stay in registers. When a
// larger score comes, what earlier keys left is scaled down (the online softmax); one division per row remains at the end.
//
// Products are of bf16 with sums in fp32, or of fp16 where the inputs are; the softmax is fp32. Inputs in fp32 are rounded to bf16 once:
// errors are those of attention in bf16. On sm_75, where a copy waits for its data, there is room for one step's keys and values instead
// of two, and three blocks of a multiprocessor take turns; products of bf16 go without tensor cores (mma.h). A NaN or +inf among its
// scores makes a row NaN, -inf alone too, as in torch.
//
// 32 x 128 tokens, 12 heads of 64: 1.6 G operations are 1.6 us at the 989 TFLOPS of an H200; q, k, v and out, 25 MB in bf16, are 5.2 us
// at 4.8 TB/s. At 8 x 512 operations are 6.5 us, and exponentials, 16 a clock of each multiprocessor, another 6 us beside them.
#include "varlen_attention.h"

#include "launch.h"
#include "mma.h"
#include "row.h"

namespace kd::cuda {
namespace {

constexpr int kTile = 64, kThreads = 128, kWarpQueries = 16;  // kTile: queries of a block, and keys of a step
constexpr int stages(bool sm80) { return sm80 ? 2 : 1; }  // of keys and values: where copies are asynchronous, the next are on their way
constexpr int kStages = stages(kSm80);
constexpr float kLog2E = 1.4426950408889634f;

template <class In_, int kSize_>
struct Shape {
  using In = In_;
  using Element = std::conditional_t<std::is_same<In, float>::value, __nv_bfloat16, In>;  // of the products
  static constexpr int kSize = kSize_;              // columns of a head, with zeros behind the real ones
  static constexpr int kRowBytes = kSize * 2 + 16;  // an odd multiple of 16: ldmatrix meets no bank twice
  static constexpr int kTileBytes = kTile * kRowBytes;
  static constexpr int kStageBytes = 2 * kTileBytes;  // keys, values
  static constexpr int shared_bytes(bool sm80) { return stages(sm80) * kStageBytes; }
  static constexpr int kOutStride = kSize + 8;
  static constexpr bool kTensorCores = kSm80 || std::is_same<Element, __half>::value;
  // That a multiprocessor shall hold.
  static constexpr int kBlocks = kSize <= 64 ? (kSm80 ? 4 : 3) : kSize <= 96 && kTensorCores ? 3 : 2;
  static_assert(kTile * kOutStride * 4 <= kStageBytes);
};

// The 16 bytes of a tile that a lane points ldmatrix to.
template <class S>
__device__ const char* chunk_of(const char* tile, int row, int chunk) {
  return tile + row * S::kRowBytes + chunk * 16;
}

// What a block has to do, and a lane's place in its warp's part.
//
// The host doesn't know the lengths, so blocks are as many as any lengths could need: sequence b has the slots from
// cu_seqlens[b] / kTile + b on, whatever comes before, and these are at least its tiles of queries. Blocks with a slot too much return;
// the heads of a slot are neighbours, so that those of room behind the tokens come last.
struct Place {
  int head, begin, end, first;    // the sequence is tokens [begin, end), the block's queries begin at `first`
  int lane, group, thread, warp;  // group and thread as the fragments of mma.h have them

  __device__ explicit Place(const VarlenAttention& op) {
    lane = threadIdx.x % 32;
    group = lane / 4;
    thread = lane % 4;
    warp = threadIdx.x / 32;
    const int heads = static_cast<int>(op.heads), slot = blockIdx.x / heads;
    head = blockIdx.x % heads;
    const int sequence = sequence_of(op, slot);
    begin = bound(op, sequence);
    end = bound(op, sequence + 1);
    first = begin + (slot - first_slot(op, sequence)) * kTile;
  }

 private:
  // Whatever cu_seqlens says, nothing beside the tensors is touched.
  __device__ static int bound(const VarlenAttention& op, int sequence) {
    const int token = op.cu_seqlens[sequence];
    return token < 0 ? 0 : token < op.tokens ? token : static_cast<int>(op.tokens);
  }

  __device__ static int first_slot(const VarlenAttention& op, int sequence) { return bound(op, sequence) / kTile + sequence; }

  // The last sequence whose slots begin at `slot` or before; each step asks for 32.
  __device__ int sequence_of(const VarlenAttention& op, int slot) const {
    int sequence = 0, count = static_cast<int>(op.sequences);
    while (count > 1) {
      const int step = (count + 31) / 32, ahead = lane * step;
      const unsigned votes = __ballot_sync(0xffffffffu, ahead < count && first_slot(op, sequence + ahead) <= slot);
      const int passed = votes == 0 ? 0 : (__popc(votes) - 1) * step;
      sequence += passed;
      count = count - passed < step ? count - passed : step;
    }
    return sequence;
  }
};

// 8 elements on a 16-byte boundary.
template <class T>
__device__ Chunk<T> load_chunk(const T* from) {
  Chunk<T> chunk;
#pragma unroll
  for (int i = 0; i < Chunk<T>::kVectors; ++i) chunk.vectors()[i] = __ldg(reinterpret_cast<const uint4*>(from) + i);
  return chunk;
}

template <class Element>
__device__ void store_chunk(char* to, const float (&x)[kChunk]) {
  *reinterpret_cast<uint4*>(to) = {pack<Element>(x[0], x[1]), pack<Element>(x[2], x[3]), pack<Element>(x[4], x[5]),
                                   pack<Element>(x[6], x[7])};
}

// Starts to bring a tile of the head's tokens from `first` on; zeros behind the sequence's last and behind the head's columns. A thread
// has the same 8 columns of every kRows-th token.
template <class S>
__device__ void load_tile(const VarlenAttention& op, const TokensView& x, const Place& at, int first, char* tile) {
  using In = typename S::In;
  using Element = typename S::Element;
  constexpr int kLanes = S::kSize == 96 ? 16 : S::kSize / kChunk, kRows = kThreads / kLanes;
  const int row = threadIdx.x / kLanes, column = threadIdx.x % kLanes * kChunk;
  const int rows = at.end - first - row, left = static_cast<int>(op.size) - column;
  if (column >= S::kSize) return;
  const In* from = static_cast<const In*>(x.data) + (int64_t{first} + row) * x.stride_token;
  from += (at.head * op.size + column) * x.stride_column;
  const int64_t step = kRows * x.stride_token;
  char* to = tile + row * S::kRowBytes + column * 2;
  const bool whole = left >= kChunk && x.stride_column == 1 && (reinterpret_cast<uintptr_t>(from) | step * sizeof(In)) % sizeof(uint4) == 0;
  constexpr int kSteps = kTile / kRows, kStepBytes = kRows * S::kRowBytes;
  if (!whole) {
#pragma unroll 1
    for (int i = 0; i < kSteps; ++i, from += step, to += kStepBytes) {
      const int real = i * kRows < rows ? left : 0;
      float given[kChunk];
#pragma unroll
      for (int k = 0; k < kChunk; ++k) given[k] = k < real ? to_float(from[k * x.stride_column]) : 0.f;
      store_chunk<Element>(to, given);
    }
  } else if constexpr (sizeof(In) == 2) {
#pragma unroll
    for (int i = 0; i < kSteps; ++i, from += step) cp_async(to + i * kStepBytes, from, i * kRows < rows);
  } else {
    constexpr int kTogether = S::kSize <= 64 ? 2 : 4;  // on their way at once, in the registers that are free
#pragma unroll 1
    for (int i = 0; i < kSteps; i += kTogether, from += kTogether * step, to += kTogether * kStepBytes) {
      Chunk<In> given[kTogether];
#pragma unroll
      for (int j = 0; j < kTogether; ++j) given[j] = (i + j) * kRows < rows ? load_chunk(from + j * step) : Chunk<In>{};
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        store_chunk<Element>(to + j * kStepBytes, given[j].at);
      }
    }
  }
}

// A warp's 16 queries against 64 keys.
using Scores = float[kTile / 8][4];

template <class S>
struct Queries {
  uint32_t q[S::kSize / 16][4];
  float out[S::kSize / 8][4];  // exponentials times values
  float largest[2], total[2];  // of rows group and group + 8; the total is of the thread's own columns

  __device__ Queries(const Place& at, const char* tile) {
#pragma unroll
    for (int k = 0; k < S::kSize / 16; ++k) {
      ldmatrix<4>(q[k], chunk_of<S>(tile, at.warp * kWarpQueries + at.lane % 16, 2 * k + at.lane / 16));
    }
#pragma unroll
    for (int n = 0; n < S::kSize / 8; ++n) {
#pragma unroll
      for (int r = 0; r < 4; ++r) out[n][r] = 0.f;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) largest[half] = -INFINITY, total[half] = 0.f;
  }

  __device__ void multiply_keys(const Place& at, const char* keys, Scores& scores) const {
#pragma unroll
    for (int k = 0; k < S::kSize / 16; ++k) {
#pragma unroll
      for (int j = 0; j < kTile / 8; j += 2) {
        uint32_t b[4];
        ldmatrix<4>(b, chunk_of<S>(keys, j * 8 + at.lane / 16 * 8 + at.lane % 8, 2 * k + at.lane / 8 % 2));
        mma<typename S::Element>(scores[j], q[k], {b[0], b[1]});
        mma<typename S::Element>(scores[j + 1], q[k], {b[2], b[3]});
      }
    }
  }

  // Scores to exponentials, in place; what was summed so far to the same maximum.
  __device__ void softmax(float times, Scores& scores) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float most = largest[half];
#pragma unroll
      for (int j = 0; j < kTile / 8; ++j) most = fmaxf(most, fmaxf(scores[j][2 * half], scores[j][2 * half + 1]));
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
      const float shift = most == -INFINITY ? 0.f : most * times;  // scores of -inf alone weigh nothing, instead of NaN
      const float before = exp2_flush(fmaf(largest[half], times, -shift));
      largest[half] = most;
      total[half] *= before;
#pragma unroll
      for (int j = 0; j < kTile / 8; ++j) {
#pragma unroll
        for (int r = 2 * half; r < 2 * half + 2; ++r) {
          scores[j][r] = exp2_flush(fmaf(scores[j][r], times, -shift));
          total[half] += scores[j][r];
        }
      }
#pragma unroll
      for (int n = 0; n < S::kSize / 8; ++n) out[n][2 * half] *= before, out[n][2 * half + 1] *= before;
    }
  }

  // A fragment of sums has the places of one of A: exponentials go from one product into the next as they are.
  __device__ void multiply_values(const Place& at, const char* values, const Scores& p) {
    using T = typename S::Element;
#pragma unroll
    for (int k = 0; k < kTile / 8; k += 2) {
      const uint32_t a[4] = {pack<T>(p[k][0], p[k][1]), pack<T>(p[k][2], p[k][3]), pack<T>(p[k + 1][0], p[k + 1][1]),
                             pack<T>(p[k + 1][2], p[k + 1][3])};
#pragma unroll
      for (int n = 0; n < S::kSize / 8; n += 2) {
        uint32_t b[4];
        ldmatrix<4, true>(b, chunk_of<S>(values, k * 8 + at.lane % 16, n + at.lane / 16));
        mma<T>(out[n], a, {b[0], b[1]});
        mma<T>(out[n + 1], a, {b[2], b[3]});
      }
    }
  }

  // The rows' results to their places among the block's.
  __device__ void stage(const Place& at, float* staged) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = total[half];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      const float over = 1.f / sum;
      float* row = staged + (at.warp * kWarpQueries + at.group + 8 * half) * S::kOutStride + 2 * at.thread;
#pragma unroll
      for (int n = 0; n < S::kSize / 8; ++n) row[8 * n] = out[n][2 * half] * over, row[8 * n + 1] = out[n][2 * half + 1] * over;
    }
  }
};

template <class S>
__device__ void store_rows(const VarlenAttention& op, const Place& at, const float* staged) {
  constexpr int kChunks = S::kSize / kChunk;
  const int size = static_cast<int>(op.size);
  for (int i = threadIdx.x; i < kTile * kChunks; i += kThreads) {
    const int row = i / kChunks, column = i % kChunks * kChunk;
    if (at.first + row >= at.end) return;
    float x[kChunk];
#pragma unroll
    for (int k = 0; k < kChunk; ++k) x[k] = load_shared<float>(staged + row * S::kOutStride + column + k);
    with_type(op.out_dtype, [&](auto type) {
      using Out = decltype(type);
      Out* out = static_cast<Out*>(op.out) + ((int64_t{at.first} + row) * op.heads + at.head) * size;
      store(out, size, on_grid(out, 0), column, x);
    });
  }
}

template <class S>
__global__ void __launch_bounds__(kThreads, S::kBlocks) attend(VarlenAttention op) {
  const Place at(op);
  if (at.first >= at.end) return;
  char* shared = dynamic_shared();
  const auto load_keys = [&](int key, int stage) {
    load_tile<S>(op, op.k, at, key, shared + stage);
    load_tile<S>(op, op.v, at, key, shared + stage + S::kTileBytes);
    cp_async_commit();
  };
  char* queries = shared + (kStages - 1) * S::kStageBytes;  // until they are in registers
  load_tile<S>(op, op.q, at, at.first, queries);
  if constexpr (kStages > 1) load_keys(at.begin, 0);
  cp_async_wait<0>();
  __syncthreads();
  Queries<S> own(at, queries);
  const bool busy = at.first + at.warp * kWarpQueries < at.end;
  for (int key = at.begin, stage = 0; key < at.end; key += kTile, stage = (kStages - 1) * S::kStageBytes - stage) {
    cp_async_wait<0>();
    __syncthreads();  // these keys have arrived for all, and all have read what lies where the next go
    if constexpr (kStages > 1) {
      if (key + kTile < at.end) load_keys(key + kTile, S::kStageBytes - stage);
    } else {
      load_keys(key, 0);
      __syncthreads();
    }
    if (!busy) continue;
    Scores scores = {};
    own.multiply_keys(at, shared + stage, scores);
    if (at.end - key < kTile) {
      const int left = at.end - key - at.thread * 2;
#pragma unroll
      for (int j = 0; j < kTile / 8; ++j) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          if (j * 8 + r % 2 >= left) scores[j][r] = -INFINITY;
        }
      }
    }
    own.softmax(op.scale * kLog2E, scores);
    own.multiply_values(at, shared + stage + S::kTileBytes, scores);
  }
  __syncthreads();
  own.stage(at, reinterpret_cast<float*>(shared));
  __syncthreads();
  store_rows<S>(op, at, reinterpret_cast<const float*>(shared));
}

template <class S>
int run(const VarlenAttention& op, void* stream) {
  const int64_t blocks = (op.tokens / kTile + op.sequences) * op.heads;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  return launch_shared(attend<S>, blocks, kThreads, S::shared_bytes(has_sm80()), stream, op);
}

template <class In>
int run_size(const VarlenAttention& op, void* stream) {
  if (op.size <= 32) return run<Shape<In, 32>>(op, stream);
  if (op.size <= 64) return run<Shape<In, 64>>(op, stream);
  if (op.size <= 96) return run<Shape<In, 96>>(op, stream);
  if (op.size <= kMostHeadSize) return run<Shape<In, 128>>(op, stream);
  return cudaErrorInvalidValue;
}

}  // namespace

int varlen_attention(const VarlenAttention& op, void* stream) {
  if (op.tokens == 0 || op.sequences == 0) return cudaSuccess;
  switch (op.q.dtype) {
    case DType::kF32: return run_size<float>(op, stream);
    case DType::kBF16: return run_size<__nv_bfloat16>(op, stream);
    case DType::kF16: return run_size<__half>(op, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace kd::cuda
