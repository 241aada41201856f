// How the floats of a row become signed 8-bit codes: q = round(x / scale), |q| <= 127, scale = max|x| / 127 of the row, or one that is
// given. For every kernel that ends in codes, so that the same floats give the same ones.
//
// What is not finite behaves as on the CPU: a row that holds NaN gets the scale NaN, one that holds Inf the scale Inf and codes of +-127
// where x is infinite, 0 elsewhere. The scale never falls below the smallest normal number, so 1 / scale is finite.
#pragma once
#include <cfloat>
#include <cstring>

#include "../ops/quant_linear.h"
#include "row.h"

namespace kd::cuda {

constexpr int32_t kInfinityBits = 0x7f800000;

struct MaxBits {
  __device__ int32_t operator()(int32_t a, int32_t b) const { return a > b ? a : b; }
};

// As integers magnitudes are ordered as the floats are, with NaN above Inf above all numbers.
__device__ inline int32_t magnitude_bits(float x) {
  int32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits & 0x7fffffff;
}

// The largest of 8 magnitudes and one more.
__device__ inline int32_t largest_bits(const float (&x)[kChunk], int32_t largest) {
#pragma unroll
  for (int k = 0; k < kChunk; ++k) largest = MaxBits()(largest, magnitude_bits(x[k]));
  return largest;
}

struct Quantizer {
  float scale, inverse;
  bool infinite;

  __device__ Quantizer(int32_t largest, float static_scale) : infinite(largest == kInfinityBits) {
    memcpy(&scale, &largest, sizeof scale);
    scale = static_scale > 0.f && largest < kInfinityBits ? static_scale : scale / 127.f;
    if (scale < FLT_MIN) scale = FLT_MIN;
    inverse = 1.f / scale;
  }

  __device__ int8_t operator()(float x) const {
    if (infinite) return static_cast<int8_t>(x == INFINITY ? 127 : x == -INFINITY ? -127 : 0);
    return static_cast<int8_t>(rintf(fminf(fmaxf(x * inverse, -127.f), 127.f)));
  }
};

// Writes the codes of 8 columns of a row from `first` on; returns their part of the row's sum.
__device__ inline int32_t store_codes(const QuantLinear& op, int64_t row, int first, const Quantizer& quantizer,
                                      const float (&x)[kChunk]) {
  struct alignas(8) Codes {
    int8_t at[kChunk];
  } codes;
  int32_t sum = 0;
#pragma unroll
  for (int k = 0; k < kChunk; ++k) {
    codes.at[k] = quantizer(x[k]);
    if (op.a_sums != nullptr) sum += codes.at[k] * op.weights.column_zeros[first + k];
  }
  *reinterpret_cast<Codes*>(op.a + row * op.weights.depth + first) = codes;
  return sum;
}

}  // namespace kd::cuda
