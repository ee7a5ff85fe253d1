// The functions between a gated layer's two projections, on vectors.
#pragma once

#include "kernels/simd.h"
#include "tokenplane_cpu.h"

namespace tp {
namespace {

// e^x to about 2 ulp: 2^n * e^r with |r| <= ln(2)/2, e^r by its Taylor polynomial. Saturates beyond +-87.
inline F32x16 exponential(F32x16 x) {
  x = select(x < -87.0f, broadcast(-87.0f), x);
  x = select(x > 87.0f, broadcast(87.0f), x);
  const F32x16 shift = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const F32x16 shifted = x * 1.44269504f + shift;
  const F32x16 n = shifted - shift;
  const F32x16 r = x - n * 0.693359375f + n * 2.12194440e-4f;
  F32x16 sum = broadcast(1.0f / 720);
  sum = sum * r + 1.0f / 120;
  sum = sum * r + 1.0f / 24;
  sum = sum * r + 1.0f / 6;
  sum = sum * r + 0.5f;
  sum = sum * r + 1.0f;
  sum = sum * r + 1.0f;
  return as<F32x16>(as<I32x16>(sum) + (as<I32x16>(shifted) << 23));
}

inline F32x16 tanh(F32x16 x) { return 1.0f - 2.0f / (1.0f + exponential(2.0f * x)); }

inline F32x16 silu(F32x16 x) { return x / (1.0f + exponential(-x)); }

// erf to 1.5e-7 (Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26).
inline F32x16 gelu(F32x16 x) {
  const F32x16 z = x * 0.70710678f;
  const F32x16 size = select(z < 0, -z, z);
  const F32x16 t = 1.0f / (1.0f + 0.3275911f * size);
  F32x16 sum = broadcast(1.061405429f);
  sum = sum * t - 1.453152027f;
  sum = sum * t + 1.421413741f;
  sum = sum * t - 0.284496736f;
  sum = sum * t + 0.254829592f;
  const F32x16 erf = 1.0f - sum * t * exponential(-size * size);
  return 0.5f * x * (1.0f + select(z < 0, -erf, erf));
}

// 0.5 x (1 + tanh(y)) is x / (1 + e^-2y).
inline F32x16 gelu_tanh(F32x16 x) {
  const F32x16 y = 0.79788456f * (x + 0.044715f * x * x * x);
  return x / (1.0f + exponential(-2.0f * y));
}

inline F32x16 activate(int activation, F32x16 x) {
  switch (activation) {
    case TP_SILU: return silu(x);
    case TP_GELU: return gelu(x);
    default: return gelu_tanh(x);
  }
}

}  // namespace
}  // namespace tp
