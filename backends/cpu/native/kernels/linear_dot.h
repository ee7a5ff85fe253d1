// Products of a few rows with one block of 32 columns: the innermost loop of a linear layer, the same for all formats.
#pragma once

#include "kernels/linear.h"
#include "kernels/linear_formats.h"
#include "kernels/simd.h"

namespace tp {
namespace {

// Rows of a packed group, from the one at `at` on.
template <class Input>
struct PackedRows {
  const Input* at;
  Input get(int64_t pair, int row) const { return at[pair * kGroupRows + row]; }
};

inline F32Pair pair_at(const float* from) { return {from[0], from[1]}; }
inline Bf16Input pair_at(const uint16_t* from) { return input_of(load_as<uint32_t>(from)); }

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

// bf16 of `pairs` pairs of one block.
template <class Format>
void widen(uint8_t* to, const uint8_t* from, int pairs) {
  constexpr FetchAll<Format, kAheadBytes> fetch;
  for (int pair = 0; pair < pairs; pair += Format::kPairs, from += Format::kBytes) {
    fetch(from);
    const Format step(from);
    for (int i = 0; i < Format::kPairs; ++i)
      for (int half = 0; half < 2; ++half, to += 64)
        store(to, pairs_of(step.get(i, half)));
  }
}

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
