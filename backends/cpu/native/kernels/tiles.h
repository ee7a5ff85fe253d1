// AMX tiles: eight registers of 16 rows of 64 bytes, and the few operations on them that kernels here use.
//
// With TP_EMULATE_TILES the same operations are plain loops, so that kernels can be tested where there is no AMX; what
// the processor refuses ends the process. TP_TILES says whether a tier has tiles, either way.
#pragma once

#include <stdint.h>
#include <string.h>

#include "kernels/simd.h"

#if defined(__AMX_BF16__) || defined(TP_EMULATE_TILES)
#define TP_TILES 1

namespace tp {
namespace {

// The most a tile holds: rows of pairs of bf16 (or of so many floats).
constexpr int kTileRows = 16, kTilePairs = 16, kTileRowBytes = 64;

// Rows and bytes per row of each tile; what ldtilecfg reads (Intel, Instruction Set Extensions Reference, 3.2).
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, int tile_rows, int bytes) {
    rows[tile] = uint8_t(tile_rows);
    row_bytes[tile] = uint16_t(bytes);
  }
};

#if defined(TP_EMULATE_TILES)

struct TileState {
  TileShapes shapes;
  uint8_t tiles[8][kTileRows][kTileRowBytes];
};
thread_local TileState tile_state;

inline void use_tiles(const TileShapes& shapes) {
  tile_state.shapes = shapes;
  memset(tile_state.tiles, 0, sizeof tile_state.tiles);
}

inline void release_tiles() { use_tiles(TileShapes{}); }

// What the processor takes for an invalid instruction.
inline void refuse(bool wrong) {
  if (wrong) __builtin_trap();
}

template <int kTile>
inline void tile_zero() {
  refuse(tile_state.shapes.rows[kTile] == 0);
  memset(tile_state.tiles[kTile], 0, sizeof tile_state.tiles[kTile]);
}

template <int kTile>
inline void tile_load(const void* from, int64_t stride_bytes) {
  tile_zero<kTile>();
  for (int row = 0; row < tile_state.shapes.rows[kTile]; ++row)
    memcpy(tile_state.tiles[kTile][row], static_cast<const char*>(from) + row * stride_bytes,
           tile_state.shapes.row_bytes[kTile]);
}

template <int kTile>
inline void tile_store(void* to, int64_t stride_bytes) {
  refuse(tile_state.shapes.rows[kTile] == 0);
  for (int row = 0; row < tile_state.shapes.rows[kTile]; ++row)
    memcpy(static_cast<char*>(to) + row * stride_bytes, tile_state.tiles[kTile][row],
           tile_state.shapes.row_bytes[kTile]);
}

// sums [rows][16 floats] += left [rows][pairs of bf16] * right [pairs][16 columns of pairs]. Products of first and of
// second elements are summed apart, as the processor does (Intel, Instruction Set Extensions Reference, TDPBF16PS);
// unlike it this does not take denormal numbers for zeros.
template <int kSums, int kLeft, int kRight>
inline void tile_multiply() {
  const TileShapes& shapes = tile_state.shapes;
  const int pairs = shapes.row_bytes[kLeft] / 4;
  refuse(shapes.rows[kSums] != shapes.rows[kLeft] || shapes.rows[kRight] != pairs ||
         shapes.row_bytes[kSums] != shapes.row_bytes[kRight] || pairs == 0);
  for (int row = 0; row < shapes.rows[kSums]; ++row) {
    F32x16 first{}, second{};
    for (int pair = 0; pair < pairs; ++pair) {
      const U32x16 left = broadcast(load_as<uint32_t>(tile_state.tiles[kLeft][row] + pair * 4));
      const U32x16 right = load_as<U32x16>(tile_state.tiles[kRight][pair]);
      first += first_of_pairs(left) * first_of_pairs(right);
      second += second_of_pairs(left) * second_of_pairs(right);
    }
    auto* sums = tile_state.tiles[kSums][row];
    store(sums, load_as<F32x16>(sums) + (first + second));
  }
}

#else

// GCC's intrinsics are macros that want a tile's number spelt out, and the one that loads shapes tells the compiler of
// their first 8 bytes only. These are the same instructions.

inline void use_tiles(const TileShapes& shapes) { asm volatile("ldtilecfg %0" : : "m"(shapes)); }

inline void release_tiles() { asm volatile("tilerelease"); }

template <int kTile>
inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
}

template <int kTile>
inline void tile_load(const void* from, int64_t stride_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride_bytes), "i"(kTile) : "memory");
}

template <int kTile>
inline void tile_store(void* to, int64_t stride_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride_bytes), "i"(kTile) : "memory");
}

template <int kSums, int kLeft, int kRight>
inline void tile_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSums), "i"(kLeft), "i"(kRight));
}

#endif

}  // namespace
}  // namespace tp

#else
#define TP_TILES 0
#endif
