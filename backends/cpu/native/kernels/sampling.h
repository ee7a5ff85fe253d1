// Drawing one token from one row of logits.
#pragma once

#include <stddef.h>

#include "tokenplane_cpu.h"

namespace tp {

struct SamplingKernels {
  // Memory that `draw` works in.
  size_t (*scratch_bytes)(int vocab);
  // Draws for one of the rows and writes its logprobs.
  void (*draw)(const tp_sampling& rows, int row, void* scratch);
};

}  // namespace tp
