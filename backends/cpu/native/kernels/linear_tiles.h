// Blocks of columns with AMX tiles, for all weights but those of floats and whatever the number of rows: the sums of a
// row then come out the same beside any others.
#pragma once

#include "kernels/linear_block.h"
#include "kernels/linear_dot.h"
#include "kernels/tiles.h"

#if TP_TILES

namespace tp {
namespace {

constexpr int kRoundRows = 2 * kTileRows;  // that four tiles of sums hold
constexpr int kWidenedPairs = 512;         // of weights, at a time: 64 KiB, in the second cache

// Tiles 0 to 3 hold sums: 0 and 1 the two halves of the first 16 rows, 2 and 3 of the others. 4 and 5 hold inputs, 6
// and 7 weights.
void shape_tiles(int rows) {
  const int first = smaller(rows, kTileRows), second = rows - first;
  TileShapes shapes;
  const int rows_of[8] = {first, first, second, second, first, second, kTilePairs, kTilePairs};
  for (int tile = 0; tile < 8; ++tile)
    if (rows_of[tile] > 0) shapes.set(tile, rows_of[tile], kTileRowBytes);
  use_tiles(shapes);
}

constexpr int64_t kSumsStride = kBlockColumns * sizeof(float);

template <bool kSecond>
void read_tiles(const float (*sums)[kBlockColumns], bool zero) {
  if (zero) {
    tile_zero<0>(), tile_zero<1>();
    if (kSecond) tile_zero<2>(), tile_zero<3>();
    return;
  }
  tile_load<0>(sums[0], kSumsStride), tile_load<1>(sums[0] + kHalfColumns, kSumsStride);
  if (kSecond) tile_load<2>(sums[kTileRows], kSumsStride), tile_load<3>(sums[kTileRows] + kHalfColumns, kSumsStride);
}

template <bool kSecond>
void write_tiles(float (*sums)[kBlockColumns]) {
  tile_store<0>(sums[0], kSumsStride), tile_store<1>(sums[0] + kHalfColumns, kSumsStride);
  if (kSecond) tile_store<2>(sums[kTileRows], kSumsStride), tile_store<3>(sums[kTileRows] + kHalfColumns, kSumsStride);
}

// sums [rows][32] += products of `pairs` pairs; values: [pair][32][2] bf16, inputs: from that pair on, stride in bytes.
// ahead: whether weights come from memory, which is asked for those that lie kAheadBytes behind.
template <bool kSecond>
void add_tiles(float (*sums)[kBlockColumns], bool zero, const uint8_t* values, const uint8_t* inputs, int64_t stride,
               int pairs, bool ahead) {
  constexpr FetchAll<Bf16Format, kAheadBytes> fetch;
  read_tiles<kSecond>(sums, zero);
  for (int pair = 0; pair < pairs; pair += kTilePairs) {
    const uint8_t* right = values + int64_t(pair) * Bf16Format::kBytes;
    for (int i = 0; ahead && i < kTilePairs; ++i) fetch(right + i * Bf16Format::kBytes);
    tile_load<6>(right, Bf16Format::kBytes);
    tile_load<7>(right + 64, Bf16Format::kBytes);
    tile_load<4>(inputs + pair * 4, stride);
    tile_multiply<0, 4, 6>();
    tile_multiply<1, 4, 7>();
    if (!kSecond) continue;
    tile_load<5>(inputs + kTileRows * stride + pair * 4, stride);
    tile_multiply<2, 5, 6>();
    tile_multiply<3, 5, 7>();
  }
  write_tiles<kSecond>(sums);
}

// Multiplies [pair][32][2] bf16 by the scales of their groups; first: the first pair, counted in the block. Products
// are rounded to bf16 once more, because sums in tiles cannot be scaled group by group.
void scale_values(uint8_t* values, const Block& block, int first, int pairs) {
  for (int pair = 0; pair < pairs; ++pair) {
    const uint16_t* scales = block.scales + (first + pair) / block.group_pairs * kBlockColumns;
    for (int half = 0; half < 2; ++half, values += 64) {
      const F32x16 scale = load_bf16(scales + half * kLanes);
      const U32x16 words = load_as<U32x16>(values);
      uint16_t even[kLanes], odd[kLanes];
      store_bf16(even, first_of_pairs(words) * scale);
      store_bf16(odd, second_of_pairs(words) * scale);
      for (int i = 0; i < kLanes; ++i) {
        memcpy(values + i * 4, even + i, 2);
        memcpy(values + i * 4 + 2, odd + i, 2);
      }
    }
  }
}

// All rows of a panel, 32 after 32, for the pairs [first, first + pairs) that values hold.
void panel_tiles(float (*sums)[kBlockColumns], const LinearInput& input, int first_row, int rows, const uint8_t* values,
                 int first, int pairs, bool from_memory) {
  const int64_t stride = input.stride * 2;
  for (int row = 0; row < rows; row += kRoundRows) {
    const int count = smaller(kRoundRows, rows - row);
    const uint8_t* at = static_cast<const uint8_t*>(input.rows) + (first_row + row) * stride + int64_t(first) * 4;
    shape_tiles(count);
    const bool ahead = from_memory && row == 0;
    if (count > kTileRows) add_tiles<true>(sums + row, first == 0, values, at, stride, pairs, ahead);
    else add_tiles<false>(sums + row, first == 0, values, at, stride, pairs, ahead);
  }
  release_tiles();  // else the system would save them whenever it takes the core away
}

void tile_sums(float (*sums)[kBlockColumns], const tp_linear_weight& w, const Block& block, const LinearInput& input,
               int first_row, int rows) {
  if (w.type == TP_BF16) return panel_tiles(sums, input, first_row, rows, block.values, 0, block.pairs, first_row == 0);
  alignas(64) uint8_t widened[kWidenedPairs * Bf16Format::kBytes];
  for (int first = 0; first < block.pairs; first += kWidenedPairs) {
    const int pairs = smaller(kWidenedPairs, block.pairs - first);
    if (w.type == TP_INT8) widen<Int8Format>(widened, block.values + size_t(first) * Int8Format::kBytes, pairs);
    else widen<Int4Format>(widened, block.values + size_t(first / Int4Format::kPairs) * Int4Format::kBytes, pairs);
    if (block.scales) scale_values(widened, block, first, pairs);
    panel_tiles(sums, input, first_row, rows, widened, first, pairs, false);
  }
}

}  // namespace
}  // namespace tp

#endif
