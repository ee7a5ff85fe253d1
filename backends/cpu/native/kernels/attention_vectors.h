// The two matrix products of attention with vectors: queries with keys, and weights with values.
//
// Each result is one chain of multiply-adds over ascending steps, whatever tile of vector registers computes it. A step
// is 64 bytes for 16 keys (or 16 columns of values): one element of each in f32, a pair of them in bf16. While a tile
// reads, it fetches what lies at the same place of `next`: blocks are scattered, and the processor cannot guess where
// they go on.
#pragma once

#include "kernels/attention.h"
#include "kernels/linear_formats.h"
#include "kernels/simd.h"

namespace tp {
namespace {

struct F32Keys {
  using Scalar = float;
  using Vector = F32x16;
  static constexpr int kWeightBytes = 4;
  static constexpr int kKeysPerStep = 1;
  static void add(F32x16& sum, const F32x16& vector, float scalar) { sum += vector * scalar; }
  static F32x16 without_second(const F32x16& vector) { return vector; }
};

struct Bf16Keys {
  using Scalar = uint32_t;
  using Vector = U32x16;
  static constexpr int kWeightBytes = 2;
  static constexpr int kKeysPerStep = 2;
  static void add(F32x16& sum, const U32x16& vector, uint32_t scalar) { add_products(sum, vector, input_of(scalar)); }
  static U32x16 without_second(const U32x16& vector) { return vector & 0xffffu; }
};

// What fits into the vector registers: rows of a tile of them, and groups of 16 keys or columns beside that many rows.
// Few rows take many groups at once: a chain alone would wait for itself.
#if defined(__AVX512F__)
constexpr int kRegisterRows = 8;
constexpr int tile_groups(int rows) { return rows == 1 ? 8 : rows <= 3 ? 4 : 2; }
#else
constexpr int kRegisterRows = 2;
constexpr int tile_groups(int) { return 2; }
#endif

inline void fetch(const uint8_t* at) { __builtin_prefetch(at, 0, 2); }

// --- Queries and keys -----------------------------------------------------------------------------------------------

template <class Format, int kRows, int kGroups>
inline void score_tile(const typename Format::Scalar* query, int steps, const uint8_t* const* keys,
                       const uint8_t* const* next, float* out, int out_stride) {
  F32x16 sums[kRows][kGroups] = {};
  for (int step = 0; step < steps; ++step) {
    typename Format::Vector vectors[kGroups];
    for (int g = 0; g < kGroups; ++g) {
      vectors[g] = load_as<typename Format::Vector>(keys[g] + size_t(step) * 64);
      fetch(next[g] + size_t(step) * 64);
    }
    for (int r = 0; r < kRows; ++r)
      for (int g = 0; g < kGroups; ++g) Format::add(sums[r][g], vectors[g], query[size_t(r) * steps + step]);
  }
  for (int r = 0; r < kRows; ++r)
    for (int g = 0; g < kGroups; ++g) store(out + size_t(r) * out_stride + g * kLanes, sums[r][g]);
}

template <class Format, int kRows>
inline void score_rows(const typename Format::Scalar* query, int steps, const uint8_t* const* keys,
                       const uint8_t* const* next, int groups, float* out, int out_stride) {
  constexpr int kGroups = tile_groups(kRows);
  int g = 0;
  for (; g + kGroups <= groups; g += kGroups)
    score_tile<Format, kRows, kGroups>(query, steps, keys + g, next + g, out + g * kLanes, out_stride);
  for (; g < groups; g += 2)
    score_tile<Format, kRows, 2>(query, steps, keys + g, next + g, out + g * kLanes, out_stride);
}

// --- Weights and values ---------------------------------------------------------------------------------------------

template <class Format, int kRows, int kColumns>
inline void value_tile(const uint8_t* weights, size_t weight_stride, const uint8_t* const* blocks,
                       const uint8_t* const* next, int keys, int columns, int first_column, float* out,
                       int out_stride) {
  constexpr int kPerStep = Format::kKeysPerStep, kSteps = kBlockTokens / kPerStep;
  F32x16 sums[kRows][kColumns] = {};
  const auto add_step = [&](int step, bool half) {
    const size_t place = (size_t(step % kSteps) * columns + first_column) * 4;
    const uint8_t *at = blocks[step / kSteps] + place, *after = next[step / kSteps] + place;
    typename Format::Vector vectors[kColumns];
    for (int c = 0; c < kColumns; ++c) {
      vectors[c] = load_as<typename Format::Vector>(at + c * 64);
      fetch(after + c * 64);
      if (half) vectors[c] = Format::without_second(vectors[c]);
    }
    for (int r = 0; r < kRows; ++r) {
      const auto weight = load_as<typename Format::Scalar>(weights + r * weight_stride + size_t(step) * 4);
      for (int c = 0; c < kColumns; ++c) Format::add(sums[r][c], vectors[c], weight);
    }
  };
  const int steps = keys / kPerStep;
  for (int step = 0; step < steps; ++step) add_step(step, false);
  // The last pair's second key may be one that nobody wrote: its weight is 0, but its value may be a NaN.
  if (keys % kPerStep) add_step(steps, true);
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < kColumns; ++c) store(out + size_t(r) * out_stride + first_column + c * kLanes, sums[r][c]);
}

template <class Format, int kRows>
inline void value_rows(const uint8_t* weights, size_t weight_stride, const uint8_t* const* blocks,
                       const uint8_t* const* next, int keys, int columns, float* out, int out_stride) {
  constexpr int kColumns = tile_groups(kRows) < 4 ? 2 : 4;
  int c = 0;
  for (; c + kColumns * kLanes <= columns; c += kColumns * kLanes)
    value_tile<Format, kRows, kColumns>(weights, weight_stride, blocks, next, keys, columns, c, out, out_stride);
  for (; c < columns; c += kLanes)
    value_tile<Format, kRows, 1>(weights, weight_stride, blocks, next, keys, columns, c, out, out_stride);
}

// --- All rows -------------------------------------------------------------------------------------------------------

// Calls body.template rows<n>(first) for tiles of at most kRegisterRows rows.
template <int kRows, class Body>
inline void tiles_of(int first, int rows, Body& body) {
  if (rows - first == kRows) return body.template rows<kRows>(first);
  if constexpr (kRows > 1) tiles_of<kRows - 1>(first, rows, body);
}

template <class Body>
inline void each_tile(int rows, Body&& body) {
  int first = 0;
  for (; first + kRegisterRows <= rows; first += kRegisterRows) body.template rows<kRegisterRows>(first);
  if (first < rows) tiles_of<kRegisterRows - 1>(first, rows, body);
}

template <class Format>
struct Scores {
  const uint8_t* query;
  int steps;
  const uint8_t* const* keys;
  const uint8_t* const* next;
  int groups;
  float* out;
  int out_stride;

  template <int kRows>
  void rows(int first) {
    score_rows<Format, kRows>(reinterpret_cast<const typename Format::Scalar*>(query) + size_t(first) * steps, steps,
                              keys, next, groups, out + size_t(first) * out_stride, out_stride);
  }
};

template <class Format>
struct Values {
  const uint8_t* weights;
  const uint8_t* const* blocks;
  const uint8_t* const* next;
  int keys, columns;
  float* out;
  int out_stride;

  template <int kRows>
  void rows(int first) {
    constexpr size_t kStride = size_t(kSpanKeys) * Format::kWeightBytes;
    value_rows<Format, kRows>(weights + first * kStride, kStride, blocks, next, keys, columns,
                              out + size_t(first) * out_stride, out_stride);
  }
};

template <class Format>
struct VectorProducts {
  static constexpr int kWeightBytes = Format::kWeightBytes;

  // out [queries][out_stride] = query [queries][steps] x keys, 16 for each of `groups`.
  static void score(const uint8_t* query, int queries, int steps, const uint8_t* const* keys,
                    const uint8_t* const* next, int groups, float* out, int out_stride) {
    each_tile(queries, Scores<Format>{query, steps, keys, next, groups, out, out_stride});
  }

  // out [queries][out_stride] = weights [queries][kSpanKeys], of which `keys` count, x values of `blocks`.
  static void multiply_values(const uint8_t* weights, int queries, const uint8_t* const* blocks,
                              const uint8_t* const* next, int keys, int columns, float* out, int out_stride) {
    each_tile(queries, Values<Format>{weights, blocks, next, keys, columns, out, out_stride});
  }
};

}  // namespace
}  // namespace tp
