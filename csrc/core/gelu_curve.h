// GELU as h + |h| T(|h|) with h = x / 2 and T a table of cubics: both kinds of GELU cost the same eleven instructions a vector on every
// ISA, where exp or erf would cost more than twice that, and a GEMM with a GELU behind it spends them on the very ports of its products.
// What gives x gives its half as easily.
//
// T has 32 pieces of width kGeluStep around i * kGeluStep, each a cubic in |h| itself: its coefficients are at most 2.5, so it rounds no
// worse than in a local coordinate, which would cost two more instructions. Each interpolates at the four Chebyshev nodes: T's error is
// below 4e-7, so GELU's is below 2e-7 |x| and rounding. In the last piece and beyond T is 1: GELU is 0 or x.
#pragma once
#include <cmath>

namespace kd {

constexpr int kGeluPieces = 32;
constexpr float kGeluStep = 0.0875f;
constexpr int kGeluCurveFloats = 4 * kGeluPieces;  // [coefficient of |h|^j][piece]

// The integral of the Gauss curve from 0 to x, and tanh's approximation of it (Hendrycks and Gimpel, arXiv 1606.08415).
inline double half_erf(double x) { return 0.5 * std::erf(x * 0.70710678118654752); }
inline double half_tanh(double x) { return 0.5 * std::tanh(0.79788456080286536 * (x + 0.044715 * x * x * x)); }

inline void make_gelu_curve(double (*function)(double), float* curve) {
  for (int piece = 0; piece < kGeluPieces; ++piece) {
    double node[4], divided[4];
    for (int j = 0; j < 4; ++j) {
      node[j] = (piece + 0.5 * std::cos((2 * j + 1) * 3.14159265358979324 / 8)) * kGeluStep;
      divided[j] = 2 * function(2 * node[j]);
    }
    for (int order = 1; order < 4; ++order)  // Newton's divided differences, then expanded into powers of |h|
      for (int j = 3; j >= order; --j) divided[j] = (divided[j] - divided[j - 1]) / (node[j] - node[j - order]);
    double power[4] = {divided[3], 0, 0, 0};
    for (int j = 2; j >= 0; --j) {
      for (int i = 3; i > 0; --i) power[i] = power[i - 1] - node[j] * power[i];
      power[0] = divided[j] - node[j] * power[0];
    }
    for (int j = 0; j < 4; ++j) curve[j * kGeluPieces + piece] = static_cast<float>(power[j]);
  }
  for (int j = 0; j < 4; ++j) curve[j * kGeluPieces + kGeluPieces - 1] = j == 0 ? 1.0f : 0.0f;
}

}  // namespace kd
