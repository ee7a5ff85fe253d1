// The paged cache's layout, and the kernels that write it and attend to it.
//
// A block holds TP_KV_BLOCK_TOKENS tokens; each of its heads is contiguous, first the values, then (int8) their scales.
// Tokens are arranged so that scores need no sums across lanes, and so that AMX reads them as they lie:
//   keys    f32 [group of 16 tokens][dim][token]       bf16, int8 [group of 16 tokens][pair of dims][token][2]
//   values  f32 [token][padded dim]                    bf16, int8 [pair of tokens][padded dim][2]
// Dimensions of keys are padded with zeros to pairs, those of values with anything to a multiple of 16. int8 has a
// scale for each token and head: f32 [token] behind keys and values each; value = int8 * scale.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "kernels/scalar.h"
#include "tokenplane_cpu.h"

namespace tp {

// Some tokens of one sequence, and the query heads that share one KV head.
struct AttentionTask {
  const tp_attention* layer;
  const int32_t* table;   // the sequence's block ids
  int kv_head;
  int first_position;     // of the first token in its sequence
  int tokens;
  tp_token_rows query;    // data: of the first token
  tp_token_rows out;
};

namespace {  // see isa.h

constexpr int kBlockTokens = TP_KV_BLOCK_TOKENS;
constexpr int kGroupTokens = kLanes;
constexpr int kSpanBlocks = 4;
constexpr int kSpanKeys = kSpanBlocks * kBlockTokens;  // that share a softmax; spans begin at multiples of it

inline int padded_value_dim(const tp_attention& l) { return round_up(l.value_dim, kLanes); }

// Key dimensions are multiplied by one (f32) or two at a time.
inline int key_steps(const tp_attention& l) { return l.type == TP_F32 ? l.key_dim : (l.key_dim + 1) / 2; }

// Bytes of one head in one block.
inline size_t key_head_bytes(const tp_attention& l) {
  const size_t bytes = size_t(key_steps(l)) * kBlockTokens * 4;
  return l.type == TP_INT8 ? bytes / 2 + kBlockTokens * sizeof(float) : bytes;
}

inline size_t value_head_bytes(const tp_attention& l) {
  const size_t values = size_t(padded_value_dim(l)) * kBlockTokens;
  return l.type == TP_F32 ? values * 4 : l.type == TP_BF16 ? values * 2 : values + kBlockTokens * sizeof(float);
}

// A query's result so far: sums [padded_value_dim], then the largest score and the sum of weights relative to it.
inline int state_floats(const tp_attention& l) { return padded_value_dim(l) + kLanes; }

inline int group_heads(const tp_attention& l) { return l.heads / l.kv_heads; }

// The first key from `start` on that a query sees, relative to `start`. A window may be as wide as an int allows.
inline int first_seen(const tp_attention& l, int position, int start) {
  const int ahead = position - start;
  return l.window == 0 || l.window > ahead ? 0 : ahead - l.window + 1;
}

// Spans of which the task's tokens see a key: [first, last).
inline int first_span(const AttentionTask& t) { return first_seen(*t.layer, t.first_position, 0) / kSpanKeys; }

inline int last_span(const AttentionTask& t) { return (t.first_position + t.tokens - 1) / kSpanKeys + 1; }

}  // namespace

struct AttentionKernels {
  // Writes one token to its place in the cache.
  void (*write)(const tp_attention& layer, int64_t index, const tp_token_rows& keys, const tp_token_rows& values,
                int token);
  // Memory that `attend` works in, for that many queries (tokens times heads).
  size_t (*scratch_bytes)(const tp_attention& layer, int queries);
  // Folds the keys of spans [first, last) that the tokens see into states [tokens, heads of the group].
  void (*attend)(const AttentionTask& task, int first_span, int last_span, float* states, void* scratch);
  // Makes states those of queries that have seen nothing.
  void (*clear)(const AttentionTask& task, float* states);
  // Folds states of later keys into earlier ones.
  void (*fold)(const AttentionTask& task, float* states, const float* later);
  // Writes results.
  void (*finish)(const AttentionTask& task, const float* states);
};

}  // namespace tp
