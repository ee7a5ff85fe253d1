// A decoder's step: one task of the team from token ids to logits.
//
// The residual stream is f32; what a linear layer reads is f32 for weights of floats and bf16 for all others. Nothing
// that is computed for a token depends on what else is in the step, but the keys of its own sequence.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "isa.h"
#include "scratch.h"
#include "team.h"
#include "tokenplane_cpu.h"

namespace tp {

class Program {
 public:
  explicit Program(const tp_decoder& decoder);

  void step(const tp_step& step);

  // Memory that its largest steps work in, besides the logits.
  size_t scratch_bytes() const;

  // Logits after the tokens wanted[first, first + count) of the last step.
  void logits(int first, int count, float* out);

 private:
  // Some residuals [count, hidden].
  struct Rows {
    float* data;
    int count;
  };

  template <class Body>
  void run(int tokens, Body&& body);
  void allocate_for_threads();
  void place_tokens(const tp_step& step);
  void attention(Team& team, const tp_layer& layer, const tp_step& step);
  void turn(const tp_layer& layer, int token);
  Rows keep_wanted(Team& team, const tp_layer& layer, const tp_step& step);
  void mlp(Team& team, const tp_layer& layer, Rows rows);
  void head(Team& team, int first, int count, float* out);
  const void* normed(Team& team, const tp_norm& norm, Rows rows, const tp_linear_weight& reader);
  void add(Team& team, const tp_linear_weight& weight, const tp_norm& norm, const void* input, Rows rows);

  const tp_decoder decoder_;
  size_t weight_bytes_;  // that a token passes through
  int num_wanted_ = 0;                // of the last step
  int threads_ = 0;                   // that few_normed_ and workspace_ are for
  const Kernels* kernels_ = nullptr;  // the same
  Scratch first_tokens_, positions_, cache_index_;  // of the step's rows and tokens
  Scratch residual_, normed_, few_normed_, qkv_, attended_, gated_, delta_;
  Scratch wanted_, wanted_attended_;  // of the wanted tokens alone
  Scratch workspace_;                 // for kernels
};

}  // namespace tp
