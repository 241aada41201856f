// The instructions of tensor cores and of what feeds them: PTX where nvcc compiles, and what the PTX manual says they do where the tests
// compile for the CPU. All 32 lanes of a warp call each of these but cp_async together.
//
// What sm_75 lacks is made of what it has: larger products of smaller ones, whose fragments are parts of theirs; products of bf16 in
// fp32, some 16 times as slow as those of fp16; a copy through a register, which has arrived when cp_async returns.
//
// Fragments of m16n8, lane = 4 * group + thread, register r of four 8-bit or two 16-bit elements, first = 4 or 2 * thread:
//   a[r]  row group + 8 * (r % 2), k from first + half * (r / 2); half = 16 (8-bit, k 32) or 8 (16-bit, k 16)
//   b[r]  column group,            k from first + half * r
//   c[r]  row group + 8 * (r / 2), column 2 * thread + r % 2
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "arch.h"
#include "row.h"
#include "shared.h"

#ifndef __CUDACC__
#include <cuda_mma.h>
#endif

namespace kd::cuda {

#ifdef __CUDACC__

__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// `bytes` of 16 from global to shared memory, past the first-level cache, and zeros behind them.
__device__ inline void cp_async_bytes(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes) : "memory");
}

__device__ inline void cp_async_commit_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kGroups>
__device__ void cp_async_wait_group() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// kCount matrices of 8 rows of 16 bytes; lane i gives the address of row i % 8 of matrix i / 8. Register r gets 4 bytes of matrix r:
// row lane / 4, 16-bit elements 2 * (lane % 4) and the next, or of the transposed matrix.
template <int kCount, bool kTranspose = false>
__device__ void ldmatrix(uint32_t (&r)[kCount], const void* row) {
  const uint32_t address = shared_address(row);
  static_assert(kCount == 1 || kCount == 2 || kCount == 4);
  if constexpr (kCount == 1 && !kTranspose)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(address) : "memory");
  if constexpr (kCount == 1 && kTranspose)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(address) : "memory");
  if constexpr (kCount == 2 && !kTranspose)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(address) : "memory");
  if constexpr (kCount == 2 && kTranspose)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(address) : "memory");
  if constexpr (kCount == 4 && !kTranspose)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
  if constexpr (kCount == 4 && kTranspose)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

#define KD_MMA(shape, types, constraint)                                                                     \
  asm volatile("mma.sync.aligned." shape ".row.col." types " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, " \
               "{%0, %1, %2, %3};"                                                                          \
               : constraint(c[0]), constraint(c[1]), constraint(c[2]), constraint(c[3])                      \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

template <class A, class B>
__device__ void mma_m16n8k32(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  constexpr bool signed_a = std::is_signed<A>::value, signed_b = std::is_signed<B>::value;
  if constexpr (signed_a && signed_b) KD_MMA("m16n8k32", "s32.s8.s8.s32", "+r");
  if constexpr (signed_a && !signed_b) KD_MMA("m16n8k32", "s32.s8.u8.s32", "+r");
  if constexpr (!signed_a && signed_b) KD_MMA("m16n8k32", "s32.u8.s8.s32", "+r");
  if constexpr (!signed_a && !signed_b) KD_MMA("m16n8k32", "s32.u8.u8.s32", "+r");
}

template <class T>
__device__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same<T, __half>::value) KD_MMA("m16n8k16", "f32.f16.f16.f32", "+f");
  if constexpr (!std::is_same<T, __half>::value) KD_MMA("m16n8k16", "f32.bf16.bf16.f32", "+f");
}

#undef KD_MMA

#define KD_MMA(types)                                                                         \
  asm volatile("mma.sync.aligned.m8n8k16.row.col." types " {%0, %1}, {%2}, {%3}, {%0, %1};" \
               : "+r"(c0), "+r"(c1) : "r"(a), "r"(b))

template <class A, class B>
__device__ void mma_m8n8k16(int32_t& c0, int32_t& c1, uint32_t a, uint32_t b) {
  constexpr bool signed_a = std::is_signed<A>::value, signed_b = std::is_signed<B>::value;
  if constexpr (signed_a && signed_b) KD_MMA("s32.s8.s8.s32");
  if constexpr (signed_a && !signed_b) KD_MMA("s32.s8.u8.s32");
  if constexpr (!signed_a && signed_b) KD_MMA("s32.u8.s8.s32");
  if constexpr (!signed_a && !signed_b) KD_MMA("s32.u8.u8.s32");
}

#undef KD_MMA

// Of fp16.
__device__ inline void mma_m16n8k8(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(b));
}

// cvt.rn: the first of the two lies in the lower half.
template <class T>
__device__ uint32_t cvt_pair(float first, float second) {
  uint32_t both;
  if constexpr (std::is_same<T, __half>::value) asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
  if constexpr (!std::is_same<T, __half>::value) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
  return both;
}

#else

using cuda_host::cp_async_bytes;
using cuda_host::cp_async_commit_group;
using cuda_host::cp_async_wait_group;
using cuda_host::cvt_pair;
using cuda_host::ldmatrix;
using cuda_host::mma_m16n8k16;
using cuda_host::mma_m16n8k32;
using cuda_host::mma_m16n8k8;
using cuda_host::mma_m8n8k16;

#endif

// 16 bytes from global to shared memory; zeros, and nothing is read, where they don't `exist`. They are there after a wait and, for other
// threads, a barrier.
__device__ inline void cp_async(void* to, const void* from, bool exist = true) {
  if constexpr (kSm80) {
    cp_async_bytes(to, from, exist ? 16 : 0);
  } else {
    *static_cast<uint4*>(to) = exist ? __ldg(static_cast<const uint4*>(from)) : uint4{};
  }
}

// Closes a group of this thread's copies.
__device__ inline void cp_async_commit() {
  if constexpr (kSm80) cp_async_commit_group();
}

// Until all but the last kGroups groups have arrived.
template <int kGroups>
__device__ void cp_async_wait() {
  if constexpr (kSm80) cp_async_wait_group<kGroups>();
}

// c += a b over 32 columns of 8 bits, exact in int32.
template <class A, class B>
__device__ void mma(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(sizeof(A) == 1 && sizeof(B) == 1);
  if constexpr (kSm80) {
    mma_m16n8k32<A, B>(c, a, b);
  } else {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int lower = 0; lower < 2; ++lower) mma_m8n8k16<A, B>(c[2 * lower], c[2 * lower + 1], a[2 * half + lower], b[half]);
    }
  }
}

// c += a b over 16 columns in fp32, without tensor cores: fragments as above, element i of register r at [r][i]. Each lane asks the others
// for the rows and columns of its four sums. A call, since hundreds of copies of it in one kernel take ptxas a minute; in words that go
// by registers.
struct Floats {
  float4 c, a[2], b;
};

__device__ __noinline__ inline float4 multiply_floats(Floats given) {
  float c[4], a[4][2], b[2][2];
  memcpy(c, &given.c, sizeof c);
  memcpy(a, given.a, sizeof a);
  memcpy(b, &given.b, sizeof b);
  const int lane = threadIdx.x % 32, of_rows = lane / 4 * 4, of_columns = lane % 4 * 8;
#pragma unroll 1
  for (int other = 0; other < 4; ++other) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      float row[2], column[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        row[i] = __shfl_sync(0xffffffffu, a[k / 2 * 2 + i][k % 2], of_rows + other);
        column[i] = __shfl_sync(0xffffffffu, b[k / 2][k % 2], of_columns + i * 4 + other);
      }
#pragma unroll
      for (int r = 0; r < 4; ++r) c[r] = fmaf(row[r / 2], column[r % 2], c[r]);
    }
  }
  return {c[0], c[1], c[2], c[3]};
}

__device__ inline void multiply_floats(float (&c)[4], const float (&a)[4][2], const float (&b)[2][2]) {
  Floats given;
  memcpy(&given.c, c, sizeof c);
  memcpy(given.a, a, sizeof a);
  memcpy(&given.b, b, sizeof b);
  given.c = multiply_floats(given);
  memcpy(c, &given.c, sizeof c);
}

template <int kRegisters>
__device__ void unpack_bf16(const uint32_t (&pairs)[kRegisters], float (&x)[kRegisters][2]) {
#pragma unroll
  for (int r = 0; r < kRegisters; ++r) {
    const uint32_t bits[] = {pairs[r] << 16, pairs[r] & 0xffff0000u};
    memcpy(x[r], bits, sizeof bits);
  }
}

// c += a b over 16 columns of bf16 or fp16, in fp32.
template <class T>
__device__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(std::is_same<T, __nv_bfloat16>::value || std::is_same<T, __half>::value);
  if constexpr (kSm80) {
    mma_m16n8k16<T>(c, a, b);
  } else if constexpr (std::is_same<T, __half>::value) {
    mma_m16n8k8(c, a[0], a[1], b[0]);
    mma_m16n8k8(c, a[2], a[3], b[1]);
  } else {
    float left[4][2], right[2][2];
    unpack_bf16(a, left);
    unpack_bf16(b, right);
    multiply_floats(c, left, right);
  }
}

// Two neighbouring elements of a fragment, rounded to nearest.
template <class T>
__device__ uint32_t pack(float first, float second) {
  static_assert(std::is_same<T, __nv_bfloat16>::value || std::is_same<T, __half>::value);
  if constexpr (kSm80) {
    return cvt_pair<T>(first, second);
  } else {
    const T parts[] = {from_float<T>(first), from_float<T>(second)};
    uint32_t both;
    memcpy(&both, parts, sizeof both);
    return both;
  }
}

}  // namespace kd::cuda
