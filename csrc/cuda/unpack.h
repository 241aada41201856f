// Codes of weights, one in each byte of a word, to what mma takes: int8, or pairs of 16-bit floats. Every weight, step * code - offset,
// is an integer within [-128, 127], which both float types hold exactly.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "row.h"

namespace kd::cuda {

// Four codes to int8: step * code - offset, raised = 128 - offset in each byte. With 128 added each byte stays within [1, 255], so that one
// multiplication and one addition of whole words carry nothing over; the xor takes the 128 off.
__device__ inline uint32_t scale_codes(uint32_t codes, uint32_t step, uint32_t raised) { return (codes * step + raised) ^ 0x80808080u; }

template <class T>
__device__ T in_word(uint32_t word, int i) {
  const uint16_t bits = static_cast<uint16_t>(word >> 16 * i);
  T x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

template <class T>
__device__ uint32_t pair(float low, float high) {
  const T parts[] = {from_float<T>(low), from_float<T>(high)};
  uint32_t word;
  memcpy(&word, parts, sizeof word);
  return word;
}

// a * b + c of both halves, rounded once.
template <class T>
__device__ uint32_t fma_pair(uint32_t a, uint32_t b, uint32_t c) {
#ifdef __CUDA_ARCH__
  uint32_t y;
  if constexpr (std::is_same<T, __half>::value) asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(c));
  if constexpr (!std::is_same<T, __half>::value) asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(c));
  return y;
#else
  float y[2];
  for (int i = 0; i < 2; ++i) y[i] = fmaf(to_float(in_word<T>(a, i)), to_float(in_word<T>(b, i)), to_float(in_word<T>(c, i)));
  return pair<T>(y[0], y[1]);
#endif
}

// Numbers as pairs: 2^m, in whose fraction a code of up to 7 bits is its own value, and others.
template <class T>
struct Pairs {
  static constexpr bool kHalf = std::is_same<T, __half>::value;
  static constexpr uint32_t kRaised = kHalf ? 0x64006400u : 0x43004300u;       // 1024 or 128
  static constexpr uint32_t kLower = kHalf ? 0xe400e400u : 0xc300c300u;        // as much below 0
  static constexpr uint32_t kLowerBy128 = kHalf ? 0xe480e480u : 0xc380c380u;   // and 128 more
  static constexpr uint32_t kOne = kHalf ? 0x3c003c00u : 0x3f803f80u, kMinusOne = kOne | 0x80008000u;
  static constexpr uint32_t kSixteen = kHalf ? 0x4c004c00u : 0x41804180u;
};

// Codes of up to 7 bits in bytes 0 and 2.
template <class T>
__device__ uint32_t small_pair(uint32_t codes, uint32_t lower = Pairs<T>::kLower) {
  return fma_pair<T>(codes | Pairs<T>::kRaised, Pairs<T>::kOne, lower);
}

// int8 in bytes 0 and 2, each with 128 added: the upper four bits and the lower ones apart.
template <class T>
__device__ uint32_t int8_pair(uint32_t raised) {
  const uint32_t upper = small_pair<T>(raised >> 4 & 0x000f000fu), lower = small_pair<T>(raised & 0x000f000fu, Pairs<T>::kLowerBy128);
  return fma_pair<T>(upper, Pairs<T>::kSixteen, lower);
}

}  // namespace kd::cuda
