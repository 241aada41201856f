// A linear layer with quantised weights: y = activation(x W^T + bias) + residual.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace kd {

enum class Activation : int64_t { kNone = 0, kRelu = 1, kGelu = 2, kGeluTanh = 3, kTanh = 4 };

// Weights as the CPU kernels read them (cuda/quant_linear.h says what differs on CUDA): groups of 16 output features, four of them a
// panel, columns padded to `depth`, a multiple of 64.
//   8 bits      group[k / 4][16 rows][4 columns] of int8: code - 128
//   below       per 32 columns: 8 vectors of 16 rows x 4 columns of codes, in bits * 64 bytes (see quant_unpack.inl); and a byte per row
//               and 32 columns, as the packed format's steps
// A weight is scale * (value - zero * column_zero), with value = code - 128 at 8 bits, step * code - offset below.
struct QuantWeights {
  int64_t rows, columns, depth, panels, segments, segment;  // `segment` columns share a scale: all of them but for 8-bit blocks
  int bits;
  const uint8_t* codes;
  const uint8_t* steps;        // [group][depth / 32][16]; null at 8 bits
  const float* scales;         // [segment][panels * 64]
  const int32_t* starts;       // [segment][panels * 64]: -128 * sum of the values, as activations stored as x + 128 add that too much
  const int32_t* zeros;        // [segment][panels * 64]; null: no zeros
  const int8_t* column_zeros;  // [depth], with zeros
  const float* column_scales;  // [depth]; null: 1. Multiplied into the activations
};

// Rows of activations of any strides: row r is at (r / inner) * stride_outer + (r % inner) * stride_inner.
struct RowsView {
  const void* data;
  int64_t inner, stride_outer, stride_inner, stride_column;
  DType dtype;
};

struct QuantLinear {
  QuantWeights weights;
  RowsView x;
  int64_t rows;  // of x

  // Quantised activations: x = a_scale * (a - 128), |a - 128| <= 127; a_sums[row][segment] = sum of (a - 128) * column_zeros. On CUDA
  // signed bytes, without the 128.
  // Where tiles multiply them (tiled() in quant_rows.inl), 16 rows by 64 columns lie together: [rows / 16][depth / 64][16][64].
  uint8_t* a;  // [rows][depth], with memory for whole 16 rows
  float* a_scale;
  int32_t* a_sums;     // null: no zeros
  float static_scale;  // of all activations; 0: each row its own, the largest magnitude / 127

  const void* bias;  // [weights.rows], contiguous; null: none
  DType bias_dtype;
  Activation activation;
  const float* curve;  // of the activation: core/gelu_curve.h
  RowsView residual;   // data null: none
  void* out;           // [rows, weights.rows], contiguous
  DType out_dtype;     // on CUDA that of x

  const int32_t* in_use;  // CUDA: how many of the rows there are, from the first on, in the device's memory; null: all

  int64_t together;  // items that a worker takes in turn, from a multiple of it on; 0 or 1: what comes next is another's
};

}  // namespace kd
