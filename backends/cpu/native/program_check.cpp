#include "program_check.h"

#include <stdint.h>

#include "attention.h"
#include "kernels/linear.h"
#include "stop.h"

namespace tp {
namespace {

bool has_shape(const tp_linear_weight& w, int64_t outputs, int64_t inputs) {
  return w.outputs == outputs && w.inputs == inputs;
}

bool fits(const tp_norm& norm, int64_t values) { return !norm.weight || (norm.size > 0 && values % norm.size == 0); }

void check(const tp_layer& layer, int hidden) {
  const char* const what = "a decoder";
  const tp_attention& a = layer.attention;
  const int64_t queries = int64_t(a.heads) * a.key_dim, keys = int64_t(a.kv_heads) * a.key_dim;
  const int64_t values = int64_t(a.kv_heads) * a.value_dim, results = int64_t(a.heads) * a.value_dim;
  require(2 * int64_t(layer.rotary_pairs) <= a.key_dim, what, "rotary_pairs is more than key_dim / 2");
  require(is_attention(a), what, "its heads are no multiple of its KV heads, or no cache has the type");
  require(has_shape(layer.qkv, queries + keys + values, hidden), what, "qkv does not give queries, keys and values");
  require(has_shape(layer.out, hidden, results), what, "out does not take what attention gives");
  require(layer.gate_up.gated && has_shape(layer.gate_up, 2 * int64_t(layer.down.inputs), hidden), what,
          "gate_up is not gated, or does not give what down takes");
  require(input_type(layer.gate_up) == input_type(layer.down), what, "gate_up gives another type than down takes");
  require(layer.down.outputs == hidden, what, "down does not give the hidden size");
  require(fits(layer.query_norm, queries) && fits(layer.key_norm, keys), what, "a norm is of no size of its heads");
}

}  // namespace

void check(const tp_decoder& decoder) {
  require(decoder.num_layers > 0 && decoder.hidden > 0 && decoder.max_tokens > 0, "a decoder", "an empty one");
  for (int i = 0; i < decoder.num_layers; ++i) check(decoder.layers[i], decoder.hidden);
  require(decoder.head.inputs == decoder.hidden && !decoder.head.gated, "a decoder",
          "the head does not take the hidden size");
  require(decoder.embedding || !is_quantized(decoder.head), "a decoder", "a quantized head is no embedding");
}

void check(const tp_decoder& decoder, const tp_step& step) {
  const char* const what = "a step";
  require(step.tokens >= 0 && step.tokens <= decoder.max_tokens, what, "more tokens than max_tokens");
  require(step.rows >= 0 && step.rows <= decoder.max_tokens, what, "more rows than max_tokens");
  int64_t tokens = 0;
  for (int row = 0; row < step.rows; ++row) {
    const int64_t end = int64_t(step.context_lens[row]) + step.num_new[row];
    require(step.num_new[row] >= 0 && step.context_lens[row] >= 0, what, "a row of less than no tokens");
    require(end <= decoder.max_keys, what, "a position beyond max_keys");
    require(end <= int64_t(step.table_stride) * TP_KV_BLOCK_TOKENS, what, "a position beyond its block table");
    tokens += step.num_new[row];
  }
  require(tokens == step.tokens, what, "its rows have not as many tokens as it has");
  require(step.num_wanted >= 0 && step.num_wanted <= decoder.max_tokens, what, "more wanted tokens than max_tokens");
  require(step.num_logits >= 0 && step.num_logits <= step.num_wanted, what, "more logits than wanted tokens");
  for (int i = 0; i < step.num_wanted; ++i)
    require(step.wanted[i] >= 0 && step.wanted[i] < step.tokens, what, "a wanted token that it does not have");
}

}  // namespace tp
