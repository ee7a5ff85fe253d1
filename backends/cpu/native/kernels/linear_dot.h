// Products of a few rows with one block of 32 columns: the innermost loops of a linear layer.
//
// A format says how a step of weights becomes vectors of pairs; `accumulate` is the same loop for all of them.
#pragma once

#include "kernels/linear.h"
#include "kernels/simd.h"

namespace tp {
namespace {

typedef uint16_t U16x32 __attribute__((vector_size(64)));
typedef uint8_t U8x64 __attribute__((vector_size(64)));

template <class Value>
inline Value load_unaligned(const void* from) {
  Value out;
  memcpy(&out, from, sizeof out);
  return out;
}

// sum[column] += weights[column][0] * pair[0] + weights[column][1] * pair[1]
inline void add_products(F32x16& sum, U16x32 weights, uint32_t pair) {
#if defined(__AVX512BF16__)
  sum = (F32x16)_mm512_dpbf16_ps((__m512)sum, bits<__m512bh>(weights), bits<__m512bh>(_mm512_set1_epi32(int(pair))));
#else
  const U32x16 words = bits<U32x16>(weights);
  sum += first_of_pairs(words) * first_of_pair(pair);
  sum += second_of_pairs(words) * second_of_pair(pair);
#endif
}

struct F32Pairs {
  F32x16 even, odd;
};

struct F32Pair {
  float even, odd;
};

inline void add_products(F32x16& sum, const F32Pairs& weights, F32Pair pair) {
  sum += weights.even * pair.even;
  sum += weights.odd * pair.odd;
}

// Each format: Element of the inputs, and Input, a pair of them; kPairs and kBytes of a step; get(pair, half) of the
// step it was made of.
struct F32Format {
  using Element = float;
  using Input = F32Pair;
  static constexpr int kPairs = 1, kBytes = 256;
  const float* at;
  explicit F32Format(const uint8_t* step) : at(reinterpret_cast<const float*>(step)) {}
  F32Pairs get(int, int half) const { return {load(at + half * kLanes), load(at + kBlockColumns + half * kLanes)}; }
};

struct Bf16Format {
  using Element = uint16_t;
  using Input = uint32_t;
  static constexpr int kPairs = 1, kBytes = 128;
  const uint8_t* at;
  explicit Bf16Format(const uint8_t* step) : at(step) {}
  U16x32 get(int, int half) const { return load_unaligned<U16x32>(at + half * 64); }
};

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

struct Int8Format {
  using Element = uint16_t;
  using Input = uint32_t;
  static constexpr int kPairs = 1, kBytes = 64;
  U16x32 halves[2];
  explicit Int8Format(const uint8_t* step) {
    const U8x64 packed = load_unaligned<U8x64>(step);
#if defined(__AVX512VBMI__)
    const __m512i index = bits<__m512i>(packed), sign = _mm512_set1_epi8(char(0x80));
    const auto look_up = [index](const uint8_t* table) {
      return _mm512_permutex2var_epi8(_mm512_load_si512(table), index, _mm512_load_si512(table + 64));
    };
    constexpr int kAOrBAndC = 0xf8;
    const __m512i high = _mm512_ternarylogic_epi32(look_up(kInt8Table.upper), index, sign, kAOrBAndC);
    const __m512i low = look_up(kInt8Table.lower);
    halves[0] = bits<U16x32>(_mm512_unpacklo_epi8(low, high));
    halves[1] = bits<U16x32>(_mm512_unpackhi_epi8(low, high));
#else
    for (int half = 0; half < 2; ++half)
      for (int i = 0; i < 32; ++i) {
        const uint8_t byte = packed[i / 8 * 16 + half * 8 + i % 8];
        const float magnitude = float(byte & 0x7f);
        halves[half][i] = uint16_t(bits<uint32_t>(magnitude) >> 16 | (byte & 0x80) << 8);
      }
#endif
  }
  U16x32 get(int, int half) const { return halves[half]; }
};

// bf16 of the 16 values of a nibble, twice, so that a look-up may ignore the bit above.
alignas(64) constexpr uint16_t kInt4Table[32] = {
    0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000,
    0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040,
    0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};

struct Int4Format {
  using Element = uint16_t;
  using Input = uint32_t;
  static constexpr int kPairs = 2, kBytes = 64;
  U16x32 words;
  explicit Int4Format(const uint8_t* step) : words(load_unaligned<U16x32>(step)) {}
  U16x32 get(int pair, int half) const {
    const U16x32 index = words >> (8 * pair + 4 * half);
#if defined(__AVX512BW__)
    return bits<U16x32>(_mm512_permutexvar_epi16(bits<__m512i>(index), _mm512_load_si512(kInt4Table)));
#else
    U16x32 out;
    for (int i = 0; i < 32; ++i) out[i] = kInt4Table[index[i] & 15];
    return out;
#endif
  }
};

// Rows of a packed group, from the one at `at` on.
template <class Input>
struct PackedRows {
  const Input* at;
  Input get(int64_t pair, int row) const { return at[pair * kGroupRows + row]; }
};

inline F32Pair pair_at(const float* from) { return {from[0], from[1]}; }
inline uint32_t pair_at(const uint16_t* from) { return load_unaligned<uint32_t>(from); }

// Rows as the caller has them, `stride` elements apart, which may be an odd number.
template <class Element>
struct DirectRows {
  const Element* at;
  int64_t stride;
  auto get(int64_t pair, int row) const { return pair_at(at + 2 * pair + row * stride); }
};

template <class Format>
constexpr int kLinesPerStep = Format::kBytes / 64;

constexpr int kAheadBytes = 8192, kDirectAheadBytes = 4096;

// What to bring into the second cache while a step is multiplied: the hardware alone looks too little ahead, and stops
// at the end of a page. Of the step that lies kAhead bytes behind, all lines.
template <class Format, int kAhead>
struct FetchAll {
  void operator()(const uint8_t* step) const {
    for (int line = 0; line < kLinesPerStep<Format>; ++line) __builtin_prefetch(step + kAhead + line * 64, 0, 2);
  }
};

// Of the step that lies `ahead` bytes behind, one line; line < 0: none.
struct FetchLine {
  int64_t ahead;
  int line;

  void operator()(const uint8_t* step) const {
    if (line >= 0) __builtin_prefetch(step + ahead + line * 64, 0, 2);
  }
};

// sums[row][half] += products of `steps` steps, pairs in ascending order.
template <int kRows, class Format, class Rows, class Fetch>
inline void accumulate(F32x16 (&sums)[kRows][2], const uint8_t* values, const Rows& rows, int64_t first_pair,
                       int steps, const Fetch& fetch) {
  for (int step = 0; step < steps; ++step, values += Format::kBytes) {
    fetch(values);
    const Format weights(values);
    for (int pair = 0; pair < Format::kPairs; ++pair) {
      const auto left = weights.get(pair, 0), right = weights.get(pair, 1);
      const int64_t p = first_pair + int64_t(step) * Format::kPairs + pair;
#pragma GCC unroll 12
      for (int row = 0; row < kRows; ++row) {
        const auto input = rows.get(p, row);
        add_products(sums[row][0], left, input);
        add_products(sums[row][1], right, input);
      }
    }
  }
}

}  // namespace
}  // namespace tp
