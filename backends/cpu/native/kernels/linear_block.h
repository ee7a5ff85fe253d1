// One block of 32 columns of a packed weight.
#pragma once

#include "kernels/linear.h"
#include "kernels/linear_dot.h"

namespace tp {
namespace {

// One block's values and what is needed to go through them.
struct Block {
  const uint8_t* values;
  const uint16_t* scales;  // [group][32], or null
  int pairs;
  int group_pairs;  // pairs that share scales; all of them if there are no groups
};

Block block_of(const tp_linear_weight& w, int block) {
  const int pairs = padded_inputs(w) / 2;
  const size_t groups = size_t(input_groups(w)) * kBlockColumns;
  return {static_cast<const uint8_t*>(w.values) + block * block_bytes(w),
          w.scales ? w.scales + block * groups : nullptr, pairs, w.scales ? w.group / 2 : pairs};
}

}  // namespace
}  // namespace tp
