// Formats of packed weights, and how a pair of them is multiplied.
//
// A format says how a step of weights becomes vectors of pairs.
#pragma once

#include "kernels/linear.h"
#include "kernels/simd.h"

namespace tp {
namespace {

struct F32Pair {
  float even, odd;
};

struct F32Pairs {
  F32x16 even, odd;
};

// sum[column] += weights[column][0] * pair[0] + weights[column][1] * pair[1]
inline void add_products(F32x16& sum, const F32Pairs& weights, F32Pair pair) {
  sum += weights.even * pair.even;
  sum += weights.odd * pair.odd;
}

// The same with weights of bf16.
inline void add_products(F32x16& sum, const U32x16& weights, F32Pair pair) {
  add_products(sum, {first_of_pairs(weights), second_of_pairs(weights)}, pair);
}

// A pair of bf16 as a product takes it.
#if defined(__AVX512BF16__)
using Bf16Input = uint32_t;
inline uint32_t input_of(uint32_t pair) { return pair; }

inline void add_products(F32x16& sum, const U32x16& weights, uint32_t pair) {
  sum = (F32x16)_mm512_dpbf16_ps((__m512)sum, bits<__m512bh>(weights), bits<__m512bh>(_mm512_set1_epi32(int(pair))));
}
#else
using Bf16Input = F32Pair;
inline F32Pair input_of(uint32_t pair) { return {first_of_pair(pair), second_of_pair(pair)}; }
#endif

// Weights that bf16 can say, as pairs of it.
inline U32x16 pairs_of(const U32x16& pairs) { return pairs; }
inline U32x16 pairs_of(const F32Pairs& weights) {
  return as<U32x16>(weights.even) >> 16 | (as<U32x16>(weights.odd) & 0xffff0000u);
}

// Each format: Element of the inputs, and Input, a pair of them; kPairs and kBytes of a step; get(pair, half) of the
// step it was made of. Quantized weights become bf16 where a table gives it at once, else floats.
// kInRegisters: that happens in fewer steps than reading the bf16 from a cache takes.
struct F32Format {
  using Element = float;
  using Input = F32Pair;
  static constexpr int kPairs = 1, kBytes = 256;
  static constexpr bool kInRegisters = true;
  const float* at;
  explicit F32Format(const uint8_t* step) : at(reinterpret_cast<const float*>(step)) {}
  F32Pairs get(int, int half) const { return {load(at + half * kLanes), load(at + kBlockColumns + half * kLanes)}; }
};

struct TakesBf16 {
  using Element = uint16_t;
  using Input = Bf16Input;
};

struct Bf16Format : TakesBf16 {
  static constexpr int kPairs = 1, kBytes = 128;
  static constexpr bool kInRegisters = true;
  const uint8_t* at;
  explicit Bf16Format(const uint8_t* step) : at(step) {}
  U32x16 get(int, int half) const { return load_as<U32x16>(at + half * 64); }
};

#if defined(__AVX512VBMI__)

// Two tables of bf16's upper and lower bytes for the magnitudes 0 to 127.
struct Int8Table {
  alignas(64) uint8_t upper[128], lower[128];
  constexpr Int8Table() : upper(), lower() {
    for (int m = 1; m < 128; ++m) {
      int exponent = 0;
      while (m >> (exponent + 1)) ++exponent;
      const int word = (127 + exponent) << 7 | ((m << (7 - exponent)) & 0x7f);
      upper[m] = uint8_t(word >> 8);
      lower[m] = uint8_t(word & 0xff);
    }
  }
};
constexpr Int8Table kInt8Table;

struct Int8Format : TakesBf16 {
  static constexpr int kPairs = 1, kBytes = 64;
  static constexpr bool kInRegisters = true;
  U32x16 halves[2];
  explicit Int8Format(const uint8_t* step) {
    const __m512i index = load_as<__m512i>(step), sign = _mm512_set1_epi8(char(0x80));
    const auto look_up = [index](const uint8_t* table) {
      return _mm512_permutex2var_epi8(_mm512_load_si512(table), index, _mm512_load_si512(table + 64));
    };
    constexpr int kAOrBAndC = 0xf8;
    const __m512i high = _mm512_ternarylogic_epi32(look_up(kInt8Table.upper), index, sign, kAOrBAndC);
    const __m512i low = look_up(kInt8Table.lower);
    halves[0] = bits<U32x16>(_mm512_unpacklo_epi8(low, high));
    halves[1] = bits<U32x16>(_mm512_unpackhi_epi8(low, high));
  }
  U32x16 get(int, int half) const { return halves[half]; }
};

#else

struct Int8Format : TakesBf16 {
  static constexpr int kPairs = 1, kBytes = 64;
  static constexpr bool kInRegisters = false;
  const uint8_t* at;
  explicit Int8Format(const uint8_t* step) : at(step) {}

  F32Pairs get(int, int half) const {
    const U32x16 words = columns(at + half * 8);
    return {number(words), number(words >> 8)};
  }

  // Both bytes of a column in a lane: 4 columns lie together, 16 bytes behind the 4 before.
  template <class Vector = U32x16>
  static Vector columns(const uint8_t* from) {
    constexpr int kCount = kCountOf<Vector>;
    if constexpr (kIsHalves<Vector>) {
      using Half = decltype(Vector::low);
      return {columns<Half>(from), columns<Half>(from + kCount / 2 * 4)};
    } else {
      Register<uint64_t, kCount / 4> fours;
      for (int i = 0; i < kCount / 4; ++i) fours[i] = load_as<uint64_t>(from + i * 16);
      return __builtin_convertvector(bits<Register<uint16_t, kCount>>(fours), Vector);
    }
  }

  // Of sign and magnitude in a lane's lowest byte.
  static F32x16 number(const U32x16& bytes) {
    const F32x16 magnitude = convert<F32x16>(as<I32x16>(bytes & 0x7fu));
    return as<F32x16>(as<U32x16>(magnitude) | (bytes & 0x80u) << 24);
  }
};

#endif

#if defined(__AVX512BW__)

// bf16 of the 16 values of a nibble, twice, so that a look-up may ignore the bit above.
alignas(64) constexpr uint16_t kInt4Table[32] = {
    0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000,
    0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040,
    0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};

struct Int4Format : TakesBf16 {
  static constexpr int kPairs = 2, kBytes = 64;
  static constexpr bool kInRegisters = true;
  Register<uint16_t, 32> words;
  explicit Int4Format(const uint8_t* step) : words(load_as<Register<uint16_t, 32>>(step)) {}
  U32x16 get(int pair, int half) const {
    const __m512i index = bits<__m512i>(words >> (8 * pair + 4 * half));
    return bits<U32x16>(_mm512_permutexvar_epi16(index, _mm512_load_si512(kInt4Table)));
  }
};

#else

struct Int4Format : TakesBf16 {
  static constexpr int kPairs = 2, kBytes = 64;
  static constexpr bool kInRegisters = false;
  U32x16 words;
  explicit Int4Format(const uint8_t* step) : words(load_as<U32x16>(step)) {}

  F32Pairs get(int pair, int half) const {
    const int shift = 8 * pair + 4 * half;
    return {number(words >> shift), number(words >> (16 + shift))};
  }

  static F32x16 number(const U32x16& nibbles) {
    return convert<F32x16>(as<I32x16>(nibbles & 15u)) - float(kInt4Zero);
  }
};

#endif

}  // namespace
}  // namespace tp
