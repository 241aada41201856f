// The instructions of tensor cores and of what feeds them, one function each: PTX where nvcc compiles, and what the PTX manual says
// they do where the tests compile for the CPU. All 32 lanes of a warp call each of these but cp_async together.
//
// Fragments of m16n8, lane = 4 * group + thread, register r of four 8-bit or two 16-bit elements, first = 4 or 2 * thread:
//   a[r]  row group + 8 * (r % 2), k from first + half * (r / 2); half = 16 (8-bit, k 32) or 8 (16-bit, k 16)
//   b[r]  column group,            k from first + half * r
//   c[r]  row group + 8 * (r / 2), column 2 * thread + r % 2
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#ifndef __CUDACC__
#include <cuda_mma.h>
#endif

namespace kd::cuda {

#ifdef __CUDACC__

__device__ inline char* dynamic_shared() {
  extern __shared__ uint4 words[];
  return reinterpret_cast<char*>(words);
}

__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// From shared memory; the tests look whether it was written.
template <class T>
__device__ T load_shared(const void* p) {
  return *static_cast<const T*>(p);
}

// 16 bytes from global to shared memory, past the first-level cache; zeros, and nothing is read, where they don't `exist`. They are there
// after a wait and, for other threads, a barrier.
__device__ inline void cp_async(void* to, const void* from, bool exist = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(exist ? 16 : 0) : "memory");
}

// Closes a group of this thread's copies.
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until all but the last kGroups groups have arrived.
template <int kGroups>
__device__ void cp_async_wait() {
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

// c += a b over 32 columns of 8 bits, exact in int32.
template <class A, class B>
__device__ void mma(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(sizeof(A) == 1 && sizeof(B) == 1);
  constexpr bool signed_a = std::is_signed<A>::value, signed_b = std::is_signed<B>::value;
  if constexpr (signed_a && signed_b) KD_MMA("m16n8k32", "s32.s8.s8.s32", "+r");
  if constexpr (signed_a && !signed_b) KD_MMA("m16n8k32", "s32.s8.u8.s32", "+r");
  if constexpr (!signed_a && signed_b) KD_MMA("m16n8k32", "s32.u8.s8.s32", "+r");
  if constexpr (!signed_a && !signed_b) KD_MMA("m16n8k32", "s32.u8.u8.s32", "+r");
}

// c += a b over 16 columns of bf16 or fp16, in fp32.
template <class T>
__device__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(std::is_same<T, __nv_bfloat16>::value || std::is_same<T, __half>::value);
  if constexpr (std::is_same<T, __half>::value) KD_MMA("m16n8k16", "f32.f16.f16.f32", "+f");
  if constexpr (!std::is_same<T, __half>::value) KD_MMA("m16n8k16", "f32.bf16.bf16.f32", "+f");
}

#undef KD_MMA

// Two neighbouring elements of a fragment, rounded to nearest.
template <class T>
__device__ uint32_t pack(float first, float second) {
  static_assert(std::is_same<T, __nv_bfloat16>::value || std::is_same<T, __half>::value);
  uint32_t both;
  if constexpr (std::is_same<T, __half>::value) asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
  if constexpr (!std::is_same<T, __half>::value) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
  return both;
}

#else

using cuda_host::cp_async;
using cuda_host::cp_async_commit;
using cuda_host::cp_async_wait;
using cuda_host::ldmatrix;
using cuda_host::load_shared;
using cuda_host::mma;
using cuda_host::pack;

inline char* dynamic_shared() { return cuda_host::dynamic_shared; }

#endif

}  // namespace kd::cuda
