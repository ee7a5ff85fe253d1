// Packed weights' layout, and the kernel that computes blocks of columns of a linear layer.
//
// The columns of a weight (its outputs; a gated one alternates 16 of the gate and 16 of the up projection) come in
// blocks of 32, padded with zeros, and inputs in pairs, padded with zeros to a multiple of 32. A block is contiguous:
//   f32   [input][column]                      4 bytes each
//   bf16  [pair][column][2]                    what AVX512-BF16 multiplies, and AMX tiles of 16 columns
//   int8  [pair][lane of 4][half of 2][4 columns][2]   sign and magnitude; 64 bytes unpack to two vectors of bf16
//   int4  [2 pairs][16 columns][2] 16-bit words; nibbles: pair 0 half 0, pair 0 half 1, pair 1 half 0, pair 1 half 1
// Scales of groups: [block][group][32] bf16. Scales of outputs, bias: [block][32] f32.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "kernels/scalar.h"
#include "tokenplane_cpu.h"

namespace tp {

namespace {  // see isa.h

constexpr int kHalfColumns = kLanes;
constexpr int kBlockColumns = 2 * kHalfColumns;
constexpr int kInputPadding = 32;
constexpr int kGroupRows = 12;   // rows that packed inputs interleave
constexpr int kDirectRows = 4;   // at most that many rows are read where they lie
constexpr int kInt4Zero = 8;     // a nibble is its value plus this

inline bool is_quantized(const tp_linear_weight& w) { return w.type == TP_INT8 || w.type == TP_INT4; }

inline int padded_inputs(const tp_linear_weight& w) { return round_up(w.inputs, kInputPadding); }

inline int column_blocks(const tp_linear_weight& w) {
  return w.gated ? round_up(w.outputs / 2, kHalfColumns) / kHalfColumns
                 : round_up(w.outputs, kBlockColumns) / kBlockColumns;
}

// Groups of inputs that share scales; the last may be shorter.
inline int input_groups(const tp_linear_weight& w) { return w.group ? round_up(w.inputs, w.group) / w.group : 1; }

// Column of an output: blocks of 32, one after the other.
inline int column_of(const tp_linear_weight& w, int output) {
  if (!w.gated) return output;
  const int half = w.outputs / 2, up = output >= half, i = up ? output - half : output;
  return i / kHalfColumns * kBlockColumns + up * kHalfColumns + i % kHalfColumns;
}

inline size_t block_bytes(const tp_linear_weight& w) {
  const size_t values = size_t(kBlockColumns) * padded_inputs(w);
  switch (w.type) {
    case TP_F32: return values * 4;
    case TP_BF16: return values * 2;
    case TP_INT8: return values;
    default: return values / 2;
  }
}

// Where input k of column c lies in a block of f32 or bf16, in elements.
inline size_t plain_place(const tp_linear_weight& w, int c, int k) {
  if (w.type == TP_F32) return size_t(k) * kBlockColumns + c;
  return (size_t(k / 2) * kBlockColumns + c) * 2 + k % 2;
}

// Type of the inputs, and of what a gated weight gives.
inline int input_type(const tp_linear_weight& w) { return w.type == TP_F32 ? TP_F32 : TP_BF16; }

}  // namespace

// Inputs of one linear layer: rows as the caller has them, or packed.
struct LinearInput {
  // [rows, inputs], or packed: [groups of kGroupRows][pairs][kGroupRows] a format's Input (two floats for bf16, too,
  // where the tier has no products of bf16), for tiles padded rows.
  const void* rows;
  int64_t stride;      // elements between rows, where they lie row by row
  int count;
  bool packed;
};

struct LinearKernels {
  // Whether that many rows must be packed before `columns`.
  bool (*wants_packed)(const tp_linear_weight& weight, int rows);
  size_t (*packed_bytes)(const tp_linear_weight& weight, int rows);
  // Packs one group of rows; their ends are padded with zeros. to: where the first group begins.
  void (*pack_group)(const tp_linear_weight& weight, const LinearInput& from, int group, void* to);
  int group_rows;
  // All rows of the column blocks [first, last), with the epilogue.
  void (*columns)(const tp_linear_weight& weight, const LinearInput& input, int first, int last,
                  const tp_linear_output& out);
};

}  // namespace tp
