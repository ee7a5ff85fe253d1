// Linear layers: packed weights, and output = input x weight^T with something done to each finished sum.
//
// Batch invariance: each output is one chain of multiply-adds over the inputs in ascending order (over each group and
// then over groups, for weights quantized in groups), whatever the number of rows and whoever computes it.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "team.h"
#include "tokenplane_cpu.h"

namespace tp {

// Bytes of memory of a packed weight with its scales and bias.
size_t linear_packed_bytes(const tp_linear_weight& weight);

// Bytes that linear() needs as workspace for that many rows, 64-byte aligned. May be 0.
size_t linear_workspace_bytes(const tp_linear_weight& weight, int rows);

// out = epilogue(input x weight^T + bias) for all rows. Every thread of the team calls it; ends with a barrier.
//
// input: [rows, weight.inputs], float for weights of floats and bf16 for all others; row r begins input_stride
// elements after row r - 1. workspace: linear_workspace_bytes of memory, shared by the threads.
void linear(Team& team, const tp_linear_weight& weight, const void* input, int64_t input_stride, int rows,
            const tp_linear_output& out, void* workspace);

}  // namespace tp
