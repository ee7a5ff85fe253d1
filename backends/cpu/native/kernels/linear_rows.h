// Input rows in the order in which the innermost loops read them.
#pragma once

#include <string.h>

#include "kernels/linear.h"
#include "kernels/linear_dot.h"
#include "kernels/simd.h"

namespace tp {
namespace {

// For tiles: rows as they are, padded.
void pad(uint16_t* to, const uint16_t* from, int64_t stride, int rows, int inputs, int padded) {
  for (int row = 0; row < rows; ++row, to += padded, from += stride) {
    memcpy(to, from, size_t(inputs) * 2);
    memset(to + inputs, 0, size_t(padded - inputs) * 2);
  }
}

// to[pair][row]: the pairs [first, last) of a group's rows, zeros behind the row's end. What stands behind the last row
// is computed with, and nobody looks at the result.
template <class Pair, class Element>
void interleave(Pair* to, const Element* from, int64_t stride, int rows, int inputs, int first, int last) {
  for (int row = 0; row < rows; ++row) {
    const Element* at = from + row * stride;
    const int whole = larger(first, smaller(inputs / 2, last));
    for (int pair = first; pair < whole; ++pair) to[pair * kGroupRows + row] = pair_at(at + 2 * pair);
    for (int pair = whole; pair < last; ++pair) {
      Element end[2] = {};
      if (2 * pair < inputs) end[0] = at[2 * pair];
      to[pair * kGroupRows + row] = pair_at(end);
    }
  }
}

#if defined(__AVX512BF16__)

// The same for 16 whole pairs of bf16: four rows at a time become, within each quarter of a vector, four pairs.
void interleave_16(uint32_t* to, const uint16_t* from, int64_t stride, int rows) {
  constexpr U32x16 kLow{0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29}, kHigh = kLow + 2;
  constexpr U32x16 kFirst{0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29}, kSecond = kFirst + 2;
  for (int row = 0; row < rows; row += 4) {
    U32x16 in[4] = {};
    for (int i = 0; i < smaller(4, rows - row); ++i) memcpy(&in[i], from + (row + i) * stride, sizeof in[i]);
    const U32x16 low01 = __builtin_shuffle(in[0], in[1], kLow), low23 = __builtin_shuffle(in[2], in[3], kLow);
    const U32x16 high01 = __builtin_shuffle(in[0], in[1], kHigh), high23 = __builtin_shuffle(in[2], in[3], kHigh);
    const U32x16 out[4] = {__builtin_shuffle(low01, low23, kFirst), __builtin_shuffle(low01, low23, kSecond),
                           __builtin_shuffle(high01, high23, kFirst), __builtin_shuffle(high01, high23, kSecond)};
    for (int quarter = 0; quarter < 4; ++quarter)
      for (int i = 0; i < 4; ++i)
        memcpy(to + (quarter * 4 + i) * kGroupRows + row, reinterpret_cast<const char*>(&out[i]) + quarter * 16, 16);
  }
}

void interleave_all(uint32_t* to, const uint16_t* from, int64_t stride, int rows, int inputs, int padded) {
  const int whole = inputs / 32 * 16;
  for (int pair = 0; pair < whole; pair += 16) interleave_16(to + pair * kGroupRows, from + 2 * pair, stride, rows);
  interleave(to, from, stride, rows, inputs, whole, padded / 2);
}

#endif

// Some pairs at a time: all of them would leave the first cache before the next row is written between them.
template <class Pair, class Element>
void interleave_all(Pair* to, const Element* from, int64_t stride, int rows, int inputs, int padded) {
  for (int pair = 0; pair < padded / 2; pair += kInputPadding / 2)
    interleave(to, from, stride, rows, inputs, pair, pair + kInputPadding / 2);
}

}  // namespace
}  // namespace tp
