// The two matrix products of attention with AMX tiles, for caches of bf16 or what was unpacked to it, and whatever the
// number of queries: what a query gets is the same beside any others.
//
// Each result is one chain of tile multiplications over ascending chunks of 16 pairs (of dims, or of keys); only the
// last may be shorter. In a chunk the processor sums first and second elements of pairs apart and adds both to what
// was there. So no pair may be multiplied by itself afterwards: other bits would come out than among its chunk.
#pragma once

#include "kernels/attention.h"
#include "kernels/attention_vectors.h"
#include "kernels/linear_dot.h"
#include "kernels/tiles.h"

#if TP_TILES

namespace tp {
namespace {

constexpr int kMostSums = 4;
static_assert(kTilePairs * 2 == kBlockTokens, "a chunk of values is a block");

// Tiles 0 to 3 hold sums, of 16 keys or columns each. The others hold operands: of whole chunks, of a shorter last one.
enum { kLeft = 4, kShortLeft = 5, kRight = 6, kShortRight = 7 };

// What is on the right. at(chunk, column): the tile of that chunk of pairs and of those 16 keys or columns of values,
// its rows `stride` bytes apart.

struct KeyTiles {
  const uint8_t* const* groups;
  int64_t stride() const { return kTileRowBytes; }
  const uint8_t* at(int chunk, int column) const { return groups[column] + chunk * (kTilePairs * kTileRowBytes); }
};

struct ValueTiles {
  const uint8_t* const* blocks;
  int columns;
  int64_t stride() const { return int64_t(columns) * 4; }
  const uint8_t* at(int chunk, int column) const { return blocks[chunk] + column * kTileRowBytes; }
};

// --- Products -------------------------------------------------------------------------------------------------------

template <int kValue>
struct Number {
  static constexpr int value = kValue;
};

// Calls body(Number<n>()) for 0 <= n < kCount: a tile's number is part of its instructions.
template <int kCount, class Body>
inline void each_sum(const Body& body) {
  if constexpr (kCount > 0) {
    each_sum<kCount - 1>(body);
    body(Number<kCount - 1>());
  }
}

template <int kLeftTile, int kRightTile, int kSums, class Right>
inline void add_chunk(const uint8_t* left, int64_t left_stride, const Right& right, const Right& next, int chunk,
                      int first_column, int pairs, bool ahead) {
  tile_load<kLeftTile>(left + chunk * (kTilePairs * 4), left_stride);
  each_sum<kSums>([&](auto sum) {
    const uint8_t *at = right.at(chunk, first_column + sum.value), *after = next.at(chunk, first_column + sum.value);
    if (ahead && after != at)
      for (int pair = 0; pair < pairs; ++pair) fetch(after + pair * right.stride());
    tile_load<kRightTile>(at, right.stride());
    tile_multiply<sum.value, kLeftTile, kRightTile>();
  });
}

// out [rows of a tile][kSums * 16] = left [rows][pairs] x right's columns of tiles from the first on.
template <int kSums, class Right>
void multiply_columns(const uint8_t* left, int64_t left_stride, const Right& right, const Right& next,
                      int first_column, int pairs, bool ahead, float* out, int64_t out_stride) {
  each_sum<kSums>([](auto sum) { tile_zero<sum.value>(); });
  const int whole = pairs / kTilePairs, rest = pairs % kTilePairs;
  for (int chunk = 0; chunk < whole; ++chunk)
    add_chunk<kLeft, kRight, kSums>(left, left_stride, right, next, chunk, first_column, kTilePairs, ahead);
  if (rest) add_chunk<kShortLeft, kShortRight, kSums>(left, left_stride, right, next, whole, first_column, rest, ahead);
  each_sum<kSums>([&](auto sum) {
    tile_store<sum.value>(out + (first_column + sum.value) * kLanes, out_stride * int64_t(sizeof(float)));
  });
}

// All queries, 16 at a time. The last 16 reach back where less are left: some results come out twice, and the same.
template <int kSums, class Right>
void multiply_rows(int queries, const uint8_t* left, int64_t left_stride, const Right& right, const Right& next,
                   int first_column, int pairs, float* out, int64_t out_stride) {
  for (int done = 0; done < queries; done += kTileRows) {
    const int last = queries - kTileRows, row = done == 0 || done < last ? done : last;
    multiply_columns<kSums>(left + row * left_stride, left_stride, right, next, first_column, pairs, done == 0,
                            out + row * out_stride, out_stride);
  }
}

// out [queries][out_stride] = left [queries][pairs], its rows left_stride bytes apart, x `columns` columns of tiles.
template <class Right>
void multiply(int queries, const uint8_t* left, int64_t left_stride, const Right& right, const Right& next,
              int columns, int pairs, float* out, int64_t out_stride) {
  const auto some = [&](auto sums, int first) {
    multiply_rows<sums.value>(queries, left, left_stride, right, next, first, pairs, out, out_stride);
  };
  int first = 0;
  for (; first + kMostSums <= columns; first += kMostSums) some(Number<kMostSums>(), first);
  switch (columns - first) {
    case 1: return some(Number<1>(), first);
    case 2: return some(Number<2>(), first);
    case 3: return some(Number<3>(), first);
  }
}

// --- Values of an odd number of keys --------------------------------------------------------------------------------

// Copies the values of an odd number of keys of a block. The last pair's second key may be one that nobody wrote: its
// weight is 0, but its value may be a NaN, and becomes 0.
inline void copy_odd_values(uint8_t* to, const uint8_t* from, int keys, int columns) {
  const size_t whole = size_t(keys / 2) * columns * 4;
  memcpy(to, from, whole);
  for (int c = 0; c < columns; c += kLanes) {
    store(to + whole + c * 4, Bf16Keys::without_second(load_as<U32x16>(from + whole + c * 4)));
  }
}

// --- Both products of a task ----------------------------------------------------------------------------------------

// Holds the tiles while it lives. Shapes are set once for all spans, and once more for a last one with part of a block.
class TileProducts {
 public:
  static constexpr int kWeightBytes = 2;

  // odd_values: memory for a block's values, or null where those that nobody wrote are numbers.
  TileProducts(int queries, int steps, uint8_t* odd_values)
      : rows_(queries < kTileRows ? queries : kTileRows), odd_values_(odd_values) {
    shape(steps % kTilePairs);
  }
  ~TileProducts() { release_tiles(); }  // else the system would save them whenever it takes the core away
  TileProducts(const TileProducts&) = delete;

  // See VectorProducts.
  void score(const uint8_t* query, int queries, int steps, const uint8_t* const* keys, const uint8_t* const* next,
             int groups, float* out, int out_stride) {
    shape_rest(steps);
    multiply(queries, query, int64_t(steps) * 4, KeyTiles{keys}, KeyTiles{next}, groups, steps, out, out_stride);
  }

  void multiply_values(const uint8_t* weights, int queries, const uint8_t* const* blocks, const uint8_t* const* next,
                       int keys, int columns, float* out, int out_stride) {
    const int pairs = (keys + 1) / 2, last = (keys - 1) / kBlockTokens;
    const uint8_t* at[kSpanBlocks];
    for (int b = 0; b <= last; ++b) at[b] = blocks[b];
    if (odd_values_ && keys % 2) {
      copy_odd_values(odd_values_, blocks[last], keys - last * kBlockTokens, columns);
      at[last] = odd_values_;
    }
    shape_rest(pairs);
    multiply(queries, weights, kSpanKeys * kWeightBytes, ValueTiles{at, columns}, ValueTiles{next, columns},
             columns / kLanes, pairs, out, out_stride);
  }

 private:
  // For products of that many pairs. A load of shapes takes as long as some multiplications.
  void shape_rest(int pairs) {
    const int rest = pairs % kTilePairs;
    if (rest != 0 && rest != rest_) shape(rest);
  }

  void shape(int rest) {
    TileShapes shapes;
    for (int sum = 0; sum < kMostSums; ++sum) shapes.set(sum, rows_, kTileRowBytes);
    shapes.set(kLeft, rows_, kTilePairs * 4);
    shapes.set(kRight, kTilePairs, kTileRowBytes);
    if (rest) shapes.set(kShortLeft, rows_, rest * 4), shapes.set(kShortRight, rest, kTileRowBytes);
    use_tiles(shapes);
    rest_ = rest;
  }

  const int rows_;
  uint8_t* const odd_values_;
  int rest_ = 0;
};

}  // namespace
}  // namespace tp

#endif
