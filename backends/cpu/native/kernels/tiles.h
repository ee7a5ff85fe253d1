// AMX tiles: eight registers of 16 rows of 64 bytes, and the few operations on them that kernels here use.
//
// With TP_EMULATE_TILES the same operations are plain loops, so that kernels can be tested where there is no AMX.
// TP_TILES says whether a tier has tiles, either way.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AMX_BF16__)
#include <immintrin.h>
#endif

#if defined(__AMX_BF16__) || defined(TP_EMULATE_TILES)
#define TP_TILES 1

namespace tp {
namespace {

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
  uint8_t tiles[8][16][64];
};
thread_local TileState tile_state;

inline void use_tiles(const TileShapes& shapes) {
  tile_state.shapes = shapes;
  memset(tile_state.tiles, 0, sizeof tile_state.tiles);
}

inline void release_tiles() { use_tiles(TileShapes{}); }

template <int kTile>
inline void tile_zero() {
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
  for (int row = 0; row < tile_state.shapes.rows[kTile]; ++row)
    memcpy(static_cast<char*>(to) + row * stride_bytes, tile_state.tiles[kTile][row],
           tile_state.shapes.row_bytes[kTile]);
}

inline float tile_bf16(const uint8_t* from) {
  uint32_t word = 0;
  memcpy(reinterpret_cast<char*>(&word) + 2, from, 2);
  float value;
  memcpy(&value, &word, 4);
  return value;
}

// sums [rows][16 floats] += left [rows][pairs of bf16] * right [pairs][16 columns of pairs]
template <int kSums, int kLeft, int kRight>
inline void tile_multiply() {
  const TileShapes& shapes = tile_state.shapes;
  for (int row = 0; row < shapes.rows[kSums]; ++row)
    for (int pair = 0; pair < shapes.row_bytes[kLeft] / 4; ++pair)
      for (int column = 0; column < shapes.row_bytes[kSums] / 4; ++column) {
        float sum;
        memcpy(&sum, tile_state.tiles[kSums][row] + column * 4, 4);
        for (int i = 0; i < 2; ++i)
          sum += tile_bf16(tile_state.tiles[kLeft][row] + pair * 4 + i * 2) *
                 tile_bf16(tile_state.tiles[kRight][pair] + column * 4 + i * 2);
        memcpy(tile_state.tiles[kSums][row] + column * 4, &sum, 4);
      }
}

#else

// GCC's intrinsics are macros that want a tile's number spelt out; these are the same instructions.

inline void use_tiles(const TileShapes& shapes) { _tile_loadconfig(&shapes); }

inline void release_tiles() { _tile_release(); }

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
