// Vectors of 16 floats that compile for every tier, and the few operations that need more than the compiler's own.
//
// The compiler splits a vector that is wider than the machine's. Everything is in an anonymous namespace, see isa.h.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels/scalar.h"
#include "tokenplane_cpu.h"

namespace tp {
namespace {

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

// Halves are combined until one is left, so that the order is the same for every tier.
template <class Combine>
inline float reduce(F32x16 v, Combine&& combine) {
  typedef float F32x8 __attribute__((vector_size(32)));
  typedef float F32x4 __attribute__((vector_size(16)));
  F32x8 eight[2];
  memcpy(eight, &v, sizeof v);
  const F32x8 half = combine(eight[0], eight[1]);
  F32x4 four[2];
  memcpy(four, &half, sizeof half);
  const F32x4 quarter = combine(four[0], four[1]);
  return combine(combine(quarter[0], quarter[2]), combine(quarter[1], quarter[3]));
}

inline float sum(F32x16 v) {
  return reduce(v, [](auto a, auto b) { return a + b; });
}

inline float largest(F32x16 v) {
  return reduce(v, [](auto a, auto b) { return a > b ? a : b; });
}

inline U32x16 lane_numbers() { return U32x16{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }

// Moves the first `count` of 16 values; loaded ones are filled up with zeros.
inline F32x16 load_some(const float* from, int count) {
  if (count >= kLanes) return load(from);
  F32x16 out{};
  memcpy(&out, from, size_t(count) * sizeof(float));
  return out;
}

inline void store_some(float* to, F32x16 value, int count) {
  if (count >= kLanes) store(to, value);
  else memcpy(to, &value, size_t(count) * sizeof(float));
}

inline F32x16 load_bf16(const uint16_t* from) {
  U16x16 half;
  memcpy(&half, from, sizeof half);
  return (F32x16)(__builtin_convertvector(half, U32x16) << 16);
}

// 16 pairs of bf16, each pair in the 32 bits of a lane: the first ones, and the second.
inline F32x16 first_of_pairs(U32x16 pairs) { return (F32x16)(pairs << 16); }
inline F32x16 second_of_pairs(U32x16 pairs) { return (F32x16)(pairs & 0xffff0000u); }

// Rounds as to_bf16 does.
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

inline void store_some(uint16_t* to, F32x16 value, int count) {
  if (count >= kLanes) return store_bf16(to, value);
  uint16_t all[kLanes];
  store_bf16(all, value);
  memcpy(to, all, size_t(count) * sizeof(uint16_t));
}

// To elements [at, at + count) of TP_F32 or TP_BF16.
inline void store_some(void* to, int type, int64_t at, F32x16 value, int count) {
  if (type == TP_F32) store_some(static_cast<float*>(to) + at, value, count);
  else store_some(static_cast<uint16_t*>(to) + at, value, count);
}

}  // namespace
}  // namespace tp
