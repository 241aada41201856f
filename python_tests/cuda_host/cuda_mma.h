// cp.async, ldmatrix and mma.sync on the CPU, after the PTX manual (sections "Asynchronous copy", "ldmatrix", "Matrix fragments for
// mma.m16n8k16", ".m16n8k32" and, as sm_75 has them, ".m16n8k8" and ".m8n8k16").
//
// A copy may arrive at any time between cp.async and the wait: its destination counts as not written from the one to the other.
// Reads check their addresses and that what they read was written; ldmatrix counts reads that its banks would have to take in turn.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace cuda_host {

inline int64_t bank_conflicts = 0;  // of ldmatrix, so far: rows of one matrix that lie in the same 16 bytes of 128

inline void cp_async_bytes(void* to, const void* from, int bytes) {
  if (const char* wrong = wrong_access(to, sizeof(uint4))) fail(wrong);
  if (reinterpret_cast<uintptr_t>(from) % sizeof(uint4) != 0) fail("cp.async reads from a misaligned address");
  unwrite(to, sizeof(uint4));
  current().copies.back().push_back({to, bytes == 16 ? *static_cast<const uint4*>(from) : uint4{}});
}

inline void cp_async_commit_group() { current().copies.emplace_back(); }

template <int kGroups>
void cp_async_wait_group() {
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
  if (lane < 8 * kCount) check_read(row, 16);
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

inline __nv_bfloat16 narrow(float x, __nv_bfloat16) { return __float2bfloat16_rn(x); }
inline __half narrow(float x, __half) { return __float2half_rn(x); }

// cvt.rn.bf16x2.f32 and .f16x2: the first of the two lies in the lower half.
template <class T>
uint32_t cvt_pair(float first, float second) {
  const T pair[2] = {narrow(first, T()), narrow(second, T())};
  uint32_t both;
  memcpy(&both, pair, sizeof both);
  return both;
}

inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
inline float widen(__half x) { return __half2float(x); }
inline int32_t widen(int8_t x) { return x; }
inline int32_t widen(uint8_t x) { return x; }

// A lane's registers: A's of kTall times 8 rows, and kDeep of A and B in a row's or column's direction.
template <int kTall, int kDeep>
struct Operands {
  uint32_t a[kDeep][kTall], b[kDeep];
};

// Element `index` of register r in a lane, counted from A's first.
template <class T, class Lanes>
auto element(const Lanes& all, unsigned lane, unsigned r, unsigned index) {
  T value;
  memcpy(&value, all.at(lane) + 4 * r + sizeof(T) * index, sizeof value);
  return widen(value);
}

template <class A, class B, class Wide, class C, int kTall, int kDeep>
void multiply(const char* instruction, C (&c)[2 * kTall], const Operands<kTall, kDeep>& mine) {
  const auto all = meet(instruction, mine);
  const unsigned lane = threadIdx.x % kWarp;
  constexpr unsigned kPer = 4 / sizeof(A), kQuad = 4 * kPer;  // elements of a register, and of four threads' registers
  for (unsigned i = 0; i < 2 * kTall; ++i) {
    const unsigned lower = i / 2, row = lane / 4, column = lane % 4 * 2 + i % 2;
    Wide sum = c[i];
    for (unsigned k = 0; k < kDeep * kQuad; ++k) {
      const unsigned thread = k % kQuad / kPer, deep = k / kQuad;
      sum += Wide(element<A>(all, row * 4 + thread, deep * kTall + lower, k % kPer)) *
             element<B>(all, column * 4 + thread, kDeep * kTall + deep, k % kPer);
    }
    c[i] = static_cast<C>(sum);
  }
}

template <class A, class B>
void mma_m16n8k32(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply<A, B, int64_t>("mma.m16n8k32", c, Operands<2, 2>{{{a[0], a[1]}, {a[2], a[3]}}, {b[0], b[1]}});
}

template <class A, class B>
void mma_m8n8k16(int32_t& c0, int32_t& c1, uint32_t a, uint32_t b) {
  int32_t c[] = {c0, c1};
  multiply<A, B, int64_t>("mma.m8n8k16", c, Operands<1, 1>{{{a}}, {b}});
  c0 = c[0], c1 = c[1];
}

template <class T>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply<T, T, double>("mma.m16n8k16", c, Operands<2, 2>{{{a[0], a[1]}, {a[2], a[3]}}, {b[0], b[1]}});
}

inline void mma_m16n8k8(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  multiply<__half, __half, double>("mma.m16n8k8", c, Operands<2, 1>{{{a0, a1}}, {b}});
}

}  // namespace cuda_host
