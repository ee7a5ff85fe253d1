// What becomes of the sums of one block of columns: scale and bias, then store, add or gate.
#pragma once

#include "kernels/activation.h"
#include "kernels/linear.h"
#include "kernels/simd.h"

namespace tp {
namespace {

inline void put_sums(float* to, F32x16 value, int count, bool add) {
  if (count >= kLanes) store(to, add ? load(to) + value : value);
  else if (count > 0) store_some(to, add ? load_some(to, count) + value : value, count);
}

// sums: of rows [first_row, first_row + rows) and the 32 columns of the block.
inline void finish(const tp_linear_weight& w, int block, const float (*sums)[kBlockColumns], int first_row, int rows,
                   const tp_linear_output& out) {
  const int column = block * kBlockColumns, output = w.gated ? column / 2 : column;
  const int left = (w.gated ? w.outputs / 2 : w.outputs) - output;
  for (int row = 0; row < rows; ++row) {
    F32x16 halves[2];
    for (int half = 0; half < 2; ++half) {
      F32x16 v = load(sums[row] + half * kLanes);
      if (w.output_scales) v = v * load(w.output_scales + column + half * kLanes);
      if (w.bias) v = v + load(w.bias + column + half * kLanes);
      halves[half] = v;
    }
    const int64_t at = (first_row + row) * out.stride + output;
    if (out.epilogue == TP_GATED) {
      store_some(out.data, input_type(w), at, activate(out.activation, halves[0]) * halves[1], left);
    } else {
      put_sums(static_cast<float*>(out.data) + at, halves[0], left, out.epilogue == TP_ADD);
      put_sums(static_cast<float*>(out.data) + at + kLanes, halves[1], left - kLanes, out.epilogue == TP_ADD);
    }
  }
}

}  // namespace
}  // namespace tp
