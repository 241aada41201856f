// cp.async, ldmatrix and mma.sync on the CPU, after the PTX manual (sections "Asynchronous copy", "ldmatrix", "Matrix fragments for
// mma.m16n8k16" and ".m16n8k32").
//
// A copy may arrive at any time between cp.async and the wait: its destination counts as not written from the one to the other.
// ldmatrix checks its addresses and that what it reads was written, and counts reads that its banks would have to take in turn.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace cuda_host {

inline int64_t bank_conflicts = 0;  // of ldmatrix, so far: rows of one matrix that lie in the same 16 bytes of 128

inline void cp_async(void* to, const void* from) {
  check_shared(to, sizeof(uint4));
  if (reinterpret_cast<uintptr_t>(from) % sizeof(uint4) != 0) fail("cp.async reads from a misaligned address");
  unwrite(to, sizeof(uint4));
  current().copies.back().push_back({to, *static_cast<const uint4*>(from)});
}

inline void cp_async_commit() { current().copies.emplace_back(); }

template <int kGroups>
void cp_async_wait() {
  auto& copies = current().copies;  // the last group is open: it is not waited for
  while (copies.size() > kGroups + 1) {
    for (const Copy& copy : copies.front()) *static_cast<uint4*>(copy.to) = copy.data;
    copies.erase(copies.begin());
  }
}

inline void count_conflicts(const Offers<const void*>& rows, unsigned first) {
  bool taken[8] = {};
  for (unsigned i = first; i < first + 8; ++i) {
    bool& bank = taken[reinterpret_cast<uintptr_t>(rows[i]) / 16 % 8];
    bank_conflicts += bank;
    bank = true;
  }
}

template <int kCount, bool kTranspose = false>
void ldmatrix(uint32_t (&r)[kCount], const void* row) {
  const unsigned lane = threadIdx.x % kWarp;
  if (lane < 8 * kCount) {
    check_shared(row, 16);
    check_written(row, 16);
  }
  const auto rows = meet("ldmatrix", row);
  for (unsigned matrix = 0; matrix < kCount; ++matrix) {
    if (lane == 0) count_conflicts(rows, 8 * matrix);
    uint16_t pair[2];
    for (unsigned i = 0; i < 2; ++i) {
      const unsigned along = lane % 4 * 2 + i, across = lane / 4;
      const void* from = rows[8 * matrix + (kTranspose ? along : across)];
      pair[i] = static_cast<const uint16_t*>(from)[kTranspose ? across : along];
    }
    memcpy(&r[matrix], pair, sizeof pair);
  }
}

struct Operands {
  uint32_t a[4], b[2];
};

inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
inline float widen(__half x) { return __half2float(x); }
inline int32_t widen(int8_t x) { return x; }
inline int32_t widen(uint8_t x) { return x; }

// The element at (row, k) of A, 16 rows, and at (k, column) of B, 8 columns, found in the lane and the register that hold it.
template <class T>
auto element(const Offers<Operands>& all, const uint32_t (Operands::*registers)[4], unsigned row, unsigned k) {
  constexpr unsigned kPer = 4 / sizeof(T), kHalf = 4 * kPer;
  const Operands held = all[row % 8 * 4 + k % kHalf / kPer];
  T values[kPer];
  memcpy(values, &(held.*registers)[row / 8 + k / kHalf * 2], sizeof values);
  return widen(values[k % kPer]);
}

template <class T>
auto element(const Offers<Operands>& all, const uint32_t (Operands::*registers)[2], unsigned column, unsigned k) {
  constexpr unsigned kPer = 4 / sizeof(T), kHalf = 4 * kPer;
  const Operands held = all[column * 4 + k % kHalf / kPer];
  T values[kPer];
  memcpy(values, &(held.*registers)[k / kHalf], sizeof values);
  return widen(values[k % kPer]);
}

template <class A, class B, class C, class Wide>
void multiply(const char* instruction, C (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Operands mine;
  memcpy(mine.a, a, sizeof mine.a);
  memcpy(mine.b, b, sizeof mine.b);
  const auto all = meet(instruction, mine);
  const unsigned lane = threadIdx.x % kWarp;
  for (unsigned i = 0; i < 4; ++i) {
    Wide sum = c[i];
    for (unsigned k = 0; k < 32 / sizeof(A); ++k) {
      sum += Wide(element<A>(all, &Operands::a, lane / 4 + i / 2 * 8, k)) * element<B>(all, &Operands::b, lane % 4 * 2 + i % 2, k);
    }
    c[i] = static_cast<C>(sum);
  }
}

template <class A, class B>
void mma(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply<A, B, int32_t, int64_t>("mma.m16n8k32", c, a, b);
}

template <class T>
void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply<T, T, float, double>("mma.m16n8k16", c, a, b);
}

}  // namespace cuda_host
