#include "kernels/linear.h"

#include "kernels/linear_block.h"
#include "kernels/linear_epilogue.h"
#include "kernels/linear_rows.h"
#include "kernels/linear_tiles.h"

namespace tp {
namespace {

constexpr int kChunkPairs = 256;            // of 32 columns in bf16: 32 KiB, all of the first cache but its stream
constexpr int kPanelRows = 8 * kGroupRows;  // whose sums stay in the first cache, too
using Sums = float[kPanelRows][kBlockColumns];

bool in_tiles(const tp_linear_weight& w) { return TP_TILES && w.type != TP_F32; }

template <int kRows>
inline void read_sums(F32x16 (&sums)[kRows][2], const float (*from)[kBlockColumns]) {
  for (int row = 0; row < kRows; ++row)
    for (int half = 0; half < 2; ++half) sums[row][half] = load(from[row] + half * kLanes);
}

template <int kRows>
inline void write_sums(float (*to)[kBlockColumns], const F32x16 (&sums)[kRows][2]) {
  for (int row = 0; row < kRows; ++row)
    for (int half = 0; half < 2; ++half) store(to[row] + half * kLanes, sums[row][half]);
}

// to[row] = (from 0 if first is 0) + products of pairs [first, last); values: of pair `first`.
template <int kRows, class Format, class Rows, class Fetch>
void plain_sums(float (*to)[kBlockColumns], const uint8_t* values, const Rows& rows, int first, int last,
                const Fetch& fetch) {
  F32x16 sums[kRows][2] = {};
  if (first > 0) read_sums<kRows>(sums, to);
  accumulate<kRows, Format>(sums, values, rows, first, (last - first) / Format::kPairs, fetch);
  write_sums<kRows>(to, sums);
}

// The same for weights with groups: to[row] += scale * (products of the group), group after group.
template <int kRows, class Format, class Rows, class Fetch>
void grouped_sums(float (*to)[kBlockColumns], const Block& block, const uint8_t* values, const Rows& rows, int first,
                  int last, const Fetch& fetch) {
  F32x16 totals[kRows][2] = {};
  if (first > 0) read_sums<kRows>(totals, to);
  for (int pair = first; pair < last; pair += block.group_pairs) {
    const int steps = smaller(block.group_pairs, last - pair) / Format::kPairs;
    F32x16 sums[kRows][2] = {};
    accumulate<kRows, Format>(sums, values, rows, pair, steps, fetch);
    values += steps * Format::kBytes;
    for (int half = 0; half < 2; ++half) {
      const F32x16 scale = load_bf16(block.scales + pair / block.group_pairs * kBlockColumns + half * kLanes);
      for (int row = 0; row < kRows; ++row) totals[row][half] += sums[row][half] * scale;
    }
  }
  write_sums<kRows>(to, totals);
}

template <int kRows, class Format, class Rows, class Fetch>
inline void some_sums(float (*to)[kBlockColumns], const Block& block, const uint8_t* values, const Rows& rows,
                      int first, int last, const Fetch& fetch) {
  if (block.scales) grouped_sums<kRows, Format>(to, block, values, rows, first, last, fetch);
  else plain_sums<kRows, Format>(to, values, rows, first, last, fetch);
}

// All loops of one format in a function of their own. Left to itself the compiler has those of some formats inline in
// `columns` and those of others apart, anew with every change, and where it chooses badly sums lie in memory.
#define TP_ONE_FUNCTION __attribute__((noinline, flatten))

// As many rows as keep their sums in registers.
#if defined(__AVX512F__)
constexpr int kMostRows = 12, kMostRowsInGroups = 6;
#else
constexpr int kMostRows = 3, kMostRowsInGroups = 3;
#endif

template <class Format>
TP_ONE_FUNCTION void direct_sums(Sums& sums, const Block& block, const LinearInput& input, int rows) {
  using Element = typename Format::Element;
  const DirectRows<Element> at{static_cast<const Element*>(input.rows), input.stride};
  const FetchAll<Format, kDirectAheadBytes> fetch;
  switch (rows) {
    case 1: return some_sums<1, Format>(sums, block, block.values, at, 0, block.pairs, fetch);
    case 2: return some_sums<2, Format>(sums, block, block.values, at, 0, block.pairs, fetch);
    case 3: return some_sums<3, Format>(sums, block, block.values, at, 0, block.pairs, fetch);
    default: return some_sums<4, Format>(sums, block, block.values, at, 0, block.pairs, fetch);
  }
}

// sums[rows] of one group of packed rows, for pairs [first, last).
template <class Format, class Fetch>
void packed_sums(float (*sums)[kBlockColumns], const Block& block, const uint8_t* values,
                 const typename Format::Input* group, int rows, int first, int last, const Fetch& fetch) {
  const int most = block.scales ? kMostRowsInGroups : kMostRows;
  for (int row = 0; row < rows; row += most) {
    const PackedRows<typename Format::Input> at{group + row};
    auto* to = sums + row;
    switch (smaller(most, rows - row)) {
      case 1: some_sums<1, Format>(to, block, values, at, first, last, fetch); break;
      case 2: some_sums<2, Format>(to, block, values, at, first, last, fetch); break;
      case 3: some_sums<3, Format>(to, block, values, at, first, last, fetch); break;
#if defined(__AVX512F__)
      case 4: some_sums<4, Format>(to, block, values, at, first, last, fetch); break;
      case 5: case 6: some_sums<6, Format>(to, block, values, at, first, last, fetch); break;
      case 7: case 8: plain_sums<8, Format>(to, values, at, first, last, fetch); break;
      default: plain_sums<12, Format>(to, values, at, first, last, fetch);
#endif
    }
  }
}

// Chunk by chunk, so that a chunk of weights is read from the first cache for all groups of rows but the first.
// Quantized weights are widened anew for each group where the units that do it have nothing else to do, and otherwise
// once for all of them.
// Memory should give weights while any group multiplies, and not only while the first does: each of the first groups
// fetches its line of every step of the next chunk. Later panels find the weights in the caches.
template <class Format>
TP_ONE_FUNCTION void panel_sums(Sums& sums, const Block& block, const LinearInput& input, int first_row, int rows) {
  const int groups = (rows + kGroupRows - 1) / kGroupRows, chunks = (block.pairs + kChunkPairs - 1) / kChunkPairs;
  const int whole = block.scales ? block.group_pairs : kInputPadding / 2;  // that a chunk is made of
  const int chunk = round_up((block.pairs + chunks - 1) / chunks, whole);
  const int64_t next_chunk = int64_t(chunk) / Format::kPairs * Format::kBytes;
  constexpr int kMostWidened = Format::kInRegisters ? 0 : 2 * kChunkPairs;  // of large groups a chunk has more
  alignas(64) uint8_t widened[kMostWidened * Bf16Format::kBytes + 1];  // 1: none at all would be an error
  for (int first = 0; first < block.pairs; first += chunk) {
    const int last = smaller(first + chunk, block.pairs);
    const uint8_t* values = block.values + size_t(first) / Format::kPairs * Format::kBytes;
    const bool widens = last - first <= kMostWidened;
    if (widens) widen<Format>(widened, values, last - first);
    for (int g = 0; g < groups; ++g) {
      const int row = g * kGroupRows, count = smaller(kGroupRows, rows - row);
      const auto* group =
          static_cast<const typename Format::Input*>(input.rows) + int64_t(first_row + row) * block.pairs;
      if (widens) {
        if constexpr (!Format::kInRegisters)
          packed_sums<Bf16Format>(sums + row, block, widened, group, count, first, last, FetchLine{0, -1});
      } else if (first_row == 0 && groups == 1) {
        packed_sums<Format>(sums + row, block, values, group, count, first, last, FetchAll<Format, kAheadBytes>());
      } else {
        const int line = first_row == 0 && g < kLinesPerStep<Format> ? g : -1;
        packed_sums<Format>(sums + row, block, values, group, count, first, last, FetchLine{next_chunk, line});
      }
    }
  }
}

template <class Format>
void vector_sums(Sums& sums, const Block& block, const LinearInput& input, int first_row, int rows) {
  if (input.packed) panel_sums<Format>(sums, block, input, first_row, rows);
  else direct_sums<Format>(sums, block, input, rows);
}

void block_sums(Sums& sums, const tp_linear_weight& w, const Block& block, const LinearInput& input, int first_row,
                int rows) {
#if TP_TILES
  if (in_tiles(w)) return tile_sums(sums, w, block, input, first_row, rows);
#endif
  switch (w.type) {
    case TP_F32: return vector_sums<F32Format>(sums, block, input, first_row, rows);
    case TP_BF16: return vector_sums<Bf16Format>(sums, block, input, first_row, rows);
    case TP_INT8: return vector_sums<Int8Format>(sums, block, input, first_row, rows);
    default: return vector_sums<Int4Format>(sums, block, input, first_row, rows);
  }
}

void columns(const tp_linear_weight& w, const LinearInput& input, int first, int last, const tp_linear_output& out) {
  alignas(64) Sums sums;
  for (int b = first; b < last; ++b) {
    const Block block = block_of(w, b);
    for (int row = 0; row < input.count; row += kPanelRows) {
      const int rows = smaller(kPanelRows, input.count - row);
      block_sums(sums, w, block, input, row, rows);
      finish(w, b, sums, row, rows, out);
    }
  }
}

bool wants_packed(const tp_linear_weight& w, int rows) {
  return w.inputs % kInputPadding != 0 || (rows > kDirectRows && !in_tiles(w));
}

size_t packed_bytes(const tp_linear_weight& w, int rows) {
  const size_t pair = w.type == TP_F32 ? sizeof(F32Format::Input) : in_tiles(w) ? 4 : sizeof(Bf16Format::Input);
  return size_t(round_up(rows, kGroupRows)) * (padded_inputs(w) / 2) * pair;
}

void pack_group(const tp_linear_weight& w, const LinearInput& from, int group, void* to) {
  const int row = group * kGroupRows, rows = smaller(kGroupRows, from.count - row), padded = padded_inputs(w);
  const int64_t pairs = int64_t(row) * padded / 2, start = row * from.stride;
  if (in_tiles(w))
    pad(static_cast<uint16_t*>(to) + 2 * pairs, static_cast<const uint16_t*>(from.rows) + start, from.stride, rows,
        w.inputs, padded);
  else if (w.type == TP_F32)
    interleave_all(static_cast<F32Format::Input*>(to) + pairs, static_cast<const float*>(from.rows) + start,
                   from.stride, rows, w.inputs, padded);
  else
    interleave_all(static_cast<Bf16Format::Input*>(to) + pairs, static_cast<const uint16_t*>(from.rows) + start,
                   from.stride, rows, w.inputs, padded);
}

}  // namespace

namespace TP_TIER {
extern const LinearKernels linear;
const LinearKernels linear = {wants_packed, packed_bytes, pack_group, kGroupRows, columns};
}  // namespace TP_TIER

}  // namespace tp
