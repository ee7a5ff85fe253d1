// What a program takes for granted: sizes that fit together. Else a step would read and write beyond what there is.
#pragma once

#include "tokenplane_cpu.h"

namespace tp {

// The decoder's parts have the sizes that tp_layer says, or the process stops with a message.
void check(const tp_decoder& decoder);

// The step's tokens and positions are within what the decoder has room for, or the process stops with a message. Slots,
// and block ids in tables, are the caller's to keep.
void check(const tp_decoder& decoder, const tp_step& step);

}  // namespace tp
