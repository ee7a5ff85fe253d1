// Vectors of 16 floats that compile for every tier, and the few operations that need more than the compiler's own.
//
// The compiler splits a vector that is wider than the machine's. Everything is in an anonymous namespace, see isa.h.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace tp {
namespace {

constexpr int kLanes = 16;
typedef float F32x16 __attribute__((vector_size(64)));
typedef int32_t I32x16 __attribute__((vector_size(64)));
typedef uint32_t U32x16 __attribute__((vector_size(64)));
typedef uint16_t U16x16 __attribute__((vector_size(32)));

inline F32x16 load(const float* from) {
  F32x16 out;
  memcpy(&out, from, sizeof out);
  return out;
}

inline void store(float* to, F32x16 value) { memcpy(to, &value, sizeof value); }

inline F32x16 broadcast(float value) { return value - F32x16{}; }

inline float sum(F32x16 v) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
}

// bf16 is the upper half of a float.
inline F32x16 load_bf16(const uint16_t* from) {
  U16x16 half;
  memcpy(&half, from, sizeof half);
  return (F32x16)(__builtin_convertvector(half, U32x16) << 16);
}

// Rounds to nearest, ties to even; a NaN stays one.
inline void store_bf16(uint16_t* to, F32x16 value) {
#if defined(__AVX512BF16__)
  const __m256bh half = _mm512_cvtneps_pbh((__m512)value);
  memcpy(to, &half, sizeof half);
#else
  const U32x16 bits = (U32x16)value;
  const U32x16 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const U32x16 nan = (bits >> 16) | 0x40;
  const U16x16 half = __builtin_convertvector(value == value ? rounded : nan, U16x16);
  memcpy(to, &half, sizeof half);
#endif
}

}  // namespace
}  // namespace tp
