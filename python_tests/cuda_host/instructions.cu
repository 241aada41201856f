// One kernel for each instruction of the shim and of csrc/cuda/mma.h, one warp each, so that tests can hold them against tables.
// nvcc compiles the kernels too: the PTX must assemble.
#include "../../csrc/cuda/launch.h"
#include "../../csrc/cuda/mma.h"

namespace kd::cuda {
namespace {

// Registers of a fragment lie [lane][register].
template <class A, class B>
__global__ void multiply_integers(const uint32_t* a, const uint32_t* b, int32_t* c) {
  uint32_t left[4], right[2];
  int32_t sums[4];
  for (int i = 0; i < 4; ++i) left[i] = a[threadIdx.x * 4 + i], sums[i] = c[threadIdx.x * 4 + i];
  for (int i = 0; i < 2; ++i) right[i] = b[threadIdx.x * 2 + i];
  mma<A, B>(sums, left, right);
  for (int i = 0; i < 4; ++i) c[threadIdx.x * 4 + i] = sums[i];
}

template <class T>
__global__ void multiply_floats(const uint32_t* a, const uint32_t* b, float* c) {
  uint32_t left[4], right[2];
  float sums[4];
  for (int i = 0; i < 4; ++i) left[i] = a[threadIdx.x * 4 + i], sums[i] = c[threadIdx.x * 4 + i];
  for (int i = 0; i < 2; ++i) right[i] = b[threadIdx.x * 2 + i];
  mma<T>(sums, left, right);
  for (int i = 0; i < 4; ++i) c[threadIdx.x * 4 + i] = sums[i];
}

// Matrix m's row r lies in 16-byte chunk r * 4 + m of `in`; by `skew` chunks further in shared memory, of which `filled` are written.
template <int kCount, bool kTranspose>
__global__ void load_matrices(const uint4* in, uint32_t* out, int skew, int filled) {
  uint4* shared = reinterpret_cast<uint4*>(dynamic_shared());
  if (static_cast<int>(threadIdx.x) < filled) shared[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  uint32_t registers[kCount];
  ldmatrix<kCount, kTranspose>(registers, shared + threadIdx.x % 8 * 4 + threadIdx.x / 8 + skew);
  for (int i = 0; i < kCount; ++i) out[threadIdx.x * kCount + i] = registers[i];
}

template <class T>
__global__ void pack_pairs(const float* in, uint32_t* out) {
  out[threadIdx.x] = pack<T>(in[threadIdx.x * 2], in[threadIdx.x * 2 + 1]);
}

// Only some lanes' 16 bytes exist: none of the others may be read.
__global__ void copy_some(const uint4* in, uint32_t* out, int some) {
  uint4* shared = reinterpret_cast<uint4*>(dynamic_shared());
  cp_async(shared + threadIdx.x, in + threadIdx.x, static_cast<int>(threadIdx.x) < some);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  uint32_t registers[4];
  ldmatrix<4>(registers, shared + threadIdx.x);
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = registers[i];
}

// Two groups of copies; `groups` of them are waited for, then the other group's data is read all the same where `hasty`.
__global__ void copy_in_groups(const uint4* in, uint32_t* out, int hasty) {
  uint4* shared = reinterpret_cast<uint4*>(dynamic_shared());
  for (int group = 0; group < 2; ++group) {
    cp_async(shared + group * 32 + threadIdx.x, in + group * 32 + threadIdx.x);
    cp_async_commit();
  }
  if (hasty) {
    cp_async_wait<1>();
  } else {
    cp_async_wait<0>();
  }
  __syncthreads();
  uint32_t registers[4];
  ldmatrix<4>(registers, shared + threadIdx.x);
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 8 + i] = registers[i];
  ldmatrix<4>(registers, shared + 32 + threadIdx.x);
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 8 + 4 + i] = registers[i];
  cp_async_wait<0>();
}

__global__ void vote(const bool* votes, uint32_t* out) {
  const bool mine = votes[threadIdx.x];
  out[threadIdx.x * 4] = __ballot_sync(0xffffffffu, mine);
  out[threadIdx.x * 4 + 1] = __any_sync(0xffffffffu, mine);
  out[threadIdx.x * 4 + 2] = __all_sync(0xffffffffu, mine);
  out[threadIdx.x * 4 + 3] = __shfl_sync(0xffffffffu, threadIdx.x, (threadIdx.x + 5) % 32);
}

// Each warp reads what the other wrote: too early without the barrier, beside the memory where `further` is not 0.
__global__ void read_each_other(uint32_t* out, int barrier, int further) {
  uint32_t* shared = reinterpret_cast<uint32_t*>(dynamic_shared());
  shared[threadIdx.x] = threadIdx.x;
  if (barrier) __syncthreads();
  out[threadIdx.x] = load_shared<uint32_t>(shared + (threadIdx.x + 32) % 64 + further);
}

// Each warp reads what the other wrote and writes over its own: too early without the barrier.
__global__ void write_behind_a_read(uint32_t* out, int barrier) {
  uint32_t* shared = reinterpret_cast<uint32_t*>(dynamic_shared());
  shared[threadIdx.x] = threadIdx.x;
  __syncthreads();
  out[threadIdx.x] = load_shared<uint32_t>(shared + (threadIdx.x + 32) % 64);
  if (barrier) __syncthreads();
  shared[threadIdx.x] = 100;
}

// Two warps write the same words, the second behind a barrier or not.
__global__ void write_twice(uint32_t* out, int barrier) {
  uint32_t* shared = reinterpret_cast<uint32_t*>(dynamic_shared());
  for (unsigned turn = 0; turn < 2; ++turn) {
    if (threadIdx.x / 32 == turn) shared[threadIdx.x % 32] = threadIdx.x;
    if (barrier) __syncthreads();
  }
  __syncthreads();
  out[threadIdx.x] = load_shared<uint32_t>(shared + threadIdx.x % 32);
}

// Half of the warp multiplies while the other half loads.
__global__ void part_ways(uint32_t* out) {
  uint32_t a[4] = {}, b[2] = {};
  int32_t c[4] = {};
  if (threadIdx.x % 2) {
    mma<int8_t, int8_t>(c, a, b);
  } else {
    out[threadIdx.x] = __ballot_sync(0xffffffffu, true);
  }
}

template <int kCount, bool kTranspose>
int load(const uint4* in, uint32_t* out, int skew, int filled) {
  return launch_shared(load_matrices<kCount, kTranspose>, 1, 32, 32 * sizeof(uint4), nullptr, in, out, skew, filled);
}

}  // namespace
}  // namespace kd::cuda

using namespace kd::cuda;

extern "C" {

int run_mma(const char* types, const uint32_t* a, const uint32_t* b, void* c) {
  const auto integers = [&](auto kernel) { return launch(kernel, 1, 32, nullptr, a, b, static_cast<int32_t*>(c)); };
  const auto floats = [&](auto kernel) { return launch(kernel, 1, 32, nullptr, a, b, static_cast<float*>(c)); };
  switch (types[0] * 256 + types[1]) {
    case 's' * 256 + 's': return integers(multiply_integers<int8_t, int8_t>);
    case 's' * 256 + 'u': return integers(multiply_integers<int8_t, uint8_t>);
    case 'u' * 256 + 's': return integers(multiply_integers<uint8_t, int8_t>);
    case 'u' * 256 + 'u': return integers(multiply_integers<uint8_t, uint8_t>);
    case 'b' * 256 + 'f': return floats(multiply_floats<__nv_bfloat16>);
    default: return floats(multiply_floats<__half>);
  }
}

int run_ldmatrix(int count, int transpose, const uint4* in, uint32_t* out, int skew, int filled) {
  switch (count) {
    case 1: return transpose ? load<1, true>(in, out, skew, filled) : load<1, false>(in, out, skew, filled);
    case 2: return transpose ? load<2, true>(in, out, skew, filled) : load<2, false>(in, out, skew, filled);
    default: return transpose ? load<4, true>(in, out, skew, filled) : load<4, false>(in, out, skew, filled);
  }
}

int run_cp_async(const uint4* in, uint32_t* out, int hasty) {
  return launch_shared(copy_in_groups, 1, 32, 64 * sizeof(uint4), nullptr, in, out, hasty);
}

int run_cp_async_some(const uint4* in, uint32_t* out, int some) {
  return launch_shared(copy_some, 1, 32, 32 * sizeof(uint4), nullptr, in, out, some);
}

int run_pack(int is_half, const float* in, uint32_t* out) {
  return launch(is_half ? pack_pairs<__half> : pack_pairs<__nv_bfloat16>, 1, 32, nullptr, in, out);
}

int run_vote(const bool* votes, uint32_t* out) { return launch(vote, 1, 32, nullptr, votes, out); }
int run_read_each_other(uint32_t* out, int barrier, int further) {
  return launch_shared(read_each_other, 1, 64, 64 * sizeof(uint32_t), nullptr, out, barrier, further);
}
int run_write_behind_a_read(uint32_t* out, int barrier) {
  return launch_shared(write_behind_a_read, 1, 64, 64 * sizeof(uint32_t), nullptr, out, barrier);
}
int run_write_twice(uint32_t* out, int barrier) {
  return launch_shared(write_twice, 1, 64, 32 * sizeof(uint32_t), nullptr, out, barrier);
}
int run_part_ways(uint32_t* out) { return launch(part_ways, 1, 32, nullptr, out); }

#ifndef __CUDACC__
int64_t bank_conflicts() { return cuda_host::bank_conflicts; }
const char* host_status_text(int status) { return cudaGetErrorString(status); }
void host_reverse_threads(bool reversed) { host_threads_reversed = reversed; }
#endif

}  // extern "C"
