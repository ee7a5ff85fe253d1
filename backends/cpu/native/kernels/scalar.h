// Single numbers: their bits, bounds and roundings, and the conversions of 16-bit floats. simd.h has vectors of them.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "tokenplane_cpu.h"

namespace tp {
namespace {  // see isa.h: kernels and the rest of the library include this

constexpr int kLanes = 16;  // floats of a vector; what is read in vectors is padded to a multiple

inline int smaller(int a, int b) { return a < b ? a : b; }
inline int larger(int a, int b) { return a < b ? b : a; }
inline int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

template <class To, class From>
inline To bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// bf16 is the upper half of a float.
inline float from_bf16(uint16_t half) { return bits<float>(uint32_t(half) << 16); }

// Two of them in 32 bits.
inline float first_of_pair(uint32_t pair) { return bits<float>(pair << 16); }
inline float second_of_pair(uint32_t pair) { return bits<float>(pair & 0xffff0000u); }

// Rounds to nearest, ties to even; a NaN stays one.
inline uint16_t to_bf16(float value) {
  const uint32_t word = bits<uint32_t>(value);
  if (value != value) return uint16_t(word >> 16 | 0x40);
  return uint16_t((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

inline float from_f16(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16, rest = half & 0x7fff;
  if (rest >= 0x7c00) return bits<float>(sign | 0x7f800000 | rest << 13);
  // Moves the bits to a float's place, then mends the exponent's bias: exact, denormal numbers included.
  return bits<float>(sign | bits<uint32_t>(bits<float>(rest << 13) * 0x1p112f));
}

// Bytes of an element of TP_F32, TP_BF16 or TP_F16.
inline size_t element_bytes(int type) { return type == TP_F32 ? 4 : 2; }

inline float element(const void* from, int type, size_t at) {
  switch (type) {
    case TP_F32: return static_cast<const float*>(from)[at];
    case TP_BF16: return from_bf16(static_cast<const uint16_t*>(from)[at]);
    default: return from_f16(static_cast<const uint16_t*>(from)[at]);
  }
}

}  // namespace
}  // namespace tp
