// Sampling: from logits to tokens and logprobs, by the law of tokenplane_core/backend/sampling.py.
#pragma once

#include <stddef.h>

#include "team.h"
#include "tokenplane_cpu.h"

namespace tp {

// Bytes of memory, 64-byte aligned and shared by the threads.
size_t sampling_workspace_bytes(int vocab, int threads);

// Draws a token for each row. One thread computes a row, and nothing of other rows enters. Ends with a barrier.
void sample(Team& team, const tp_sampling& rows, void* workspace);

}  // namespace tp
