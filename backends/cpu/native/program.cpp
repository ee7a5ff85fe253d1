#include "program.h"

#include <string.h>

#include <algorithm>
#include <new>

#include "attention.h"
#include "embedding.h"
#include "kernels/attention.h"
#include "kernels/linear.h"
#include "kernels/pointwise.h"
#include "linear.h"
#include "program_check.h"
#include "stop.h"

namespace tp {
namespace {

// Steps that read fewer bytes of weights than this, counted for each token, end before a second thread has woken.
constexpr size_t kSmallStepBytes = 2 << 20;
constexpr int kTokensPerItem = 8;
constexpr int kFewRows = 8;

size_t input_bytes(const tp_linear_weight& w) { return element_bytes(input_type(w)); }

// Calls body(i) for 0 <= i < count, each once; ends with a barrier.
template <class Body>
void share_rows(Team& team, int count, Body&& body) {
  team.share((count + kTokensPerItem - 1) / kTokensPerItem, [&](int item) {
    for (int i = item * kTokensPerItem; i < std::min(count, (item + 1) * kTokensPerItem); ++i) body(i);
  });
}

}  // namespace

// --- Memory ---------------------------------------------------------------------------------------------------------

Program::Program(const tp_decoder& decoder) : decoder_(decoder), weight_bytes_(linear_packed_bytes(decoder.head)) {
  check(decoder);
  const size_t tokens = decoder.max_tokens, hidden = decoder.hidden;
  size_t qkv = 0, attended = 0, gated = 0;
  for (int i = 0; i < decoder.num_layers; ++i) {
    const tp_layer& layer = decoder.layers[i];
    qkv = std::max<size_t>(qkv, layer.qkv.outputs);
    attended = std::max<size_t>(attended, layer.out.inputs);
    gated = std::max<size_t>(gated, layer.down.inputs);
    for (const tp_linear_weight* weight : {&layer.qkv, &layer.out, &layer.gate_up, &layer.down})
      weight_bytes_ += linear_packed_bytes(*weight);
  }
  for (Scratch* scratch : {&first_tokens_, &positions_}) scratch->allocate(tokens * sizeof(int32_t));
  cache_index_.allocate(tokens * sizeof(int64_t));
  qkv_.allocate(tokens * qkv * sizeof(float));
  for (Scratch* scratch : {&residual_, &normed_, &delta_, &wanted_}) scratch->allocate(tokens * hidden * sizeof(float));
  for (Scratch* scratch : {&attended_, &wanted_attended_}) scratch->allocate(tokens * attended * sizeof(float));
  gated_.allocate(tokens * gated * sizeof(float));
  allocate_for_threads();
}

// What depends on how many threads there are, and on the tier.
void Program::allocate_for_threads() {
  threads_ = pool().size(), kernels_ = &kernels();
  size_t workspace = linear_workspace_bytes(decoder_.head, decoder_.max_tokens);
  for (int i = 0; i < decoder_.num_layers; ++i) {
    const tp_layer& layer = decoder_.layers[i];
    workspace = std::max(workspace, attention_workspace_bytes(layer.attention, decoder_.max_keys, threads_));
    for (const tp_linear_weight* weight : {&layer.qkv, &layer.out, &layer.gate_up, &layer.down})
      workspace = std::max(workspace, linear_workspace_bytes(*weight, decoder_.max_tokens));
  }
  few_normed_.allocate(size_t(threads_) * kFewRows * decoder_.hidden * sizeof(float));
  workspace_.allocate(workspace);
}

size_t Program::scratch_bytes() const {
  size_t bytes = 0;
  for (const Scratch* scratch :
       {&first_tokens_, &positions_, &cache_index_, &residual_, &normed_, &few_normed_, &qkv_, &attended_, &gated_,
        &delta_, &wanted_, &wanted_attended_, &workspace_})
    bytes += scratch->bytes();
  return bytes;
}

// --- A step ---------------------------------------------------------------------------------------------------------

template <class Body>
void Program::run(int tokens, Body&& body) {
  if (pool().size() != threads_ || &kernels() != kernels_) allocate_for_threads();  // set anew since
  pool().run_small(tokens * weight_bytes_ < kSmallStepBytes, body);
}

void Program::step(const tp_step& step) {
  check(decoder_, step);
  place_tokens(step);
  num_wanted_ = step.num_wanted;
  run(step.tokens, [&](Team& team) {
    share_rows(team, step.tokens, [&](int i) {
      embedding_row(decoder_, step.token_ids[i], residual_.as<float>() + size_t(i) * decoder_.hidden);
    });
    Rows rows{residual_.as<float>(), step.tokens};
    for (int i = 0; i < decoder_.num_layers; ++i) {
      const tp_layer& layer = decoder_.layers[i];
      attention(team, layer, step);
      const bool last = i == decoder_.num_layers - 1;
      if (last) rows = keep_wanted(team, layer, step);
      add(team, layer.out, layer.attention_norm, (last ? wanted_attended_ : attended_).as<void>(), rows);
      mlp(team, layer, rows);
    }
    head(team, 0, step.num_logits, step.logits);
  });
}

void Program::logits(int first, int count, float* out) {
  require(first >= 0 && count >= 0 && count <= num_wanted_ - first, "tp_program_logits",
          "of tokens that the last step did not want");
  run(count, [&](Team& team) { head(team, first, count, out); });
}

void Program::place_tokens(const tp_step& step) {
  int token = 0;
  for (int row = 0; row < step.rows; ++row) {
    const int32_t* table = step.tables + size_t(step.slots[row]) * step.table_stride;
    first_tokens_.as<int32_t>()[row] = token;
    for (int i = 0; i < step.num_new[row]; ++i, ++token) {
      const int position = step.context_lens[row] + i;
      const int64_t block = table[position / TP_KV_BLOCK_TOKENS];
      positions_.as<int32_t>()[token] = position;
      cache_index_.as<int64_t>()[token] = block * TP_KV_BLOCK_TOKENS + position % TP_KV_BLOCK_TOKENS;
    }
  }
}

// --- Parts of a layer -----------------------------------------------------------------------------------------------

// Into attended_: what every token of the step draws from the keys it sees. Its own are written to the cache.
void Program::attention(Team& team, const tp_layer& layer, const tp_step& step) {
  const tp_attention& a = layer.attention;
  const int64_t width = layer.qkv.outputs;
  float* queries = qkv_.as<float>();
  float* keys = queries + a.heads * a.key_dim;
  const void* input = normed(team, layer.input_norm, {residual_.as<float>(), step.tokens}, layer.qkv);
  linear(team, layer.qkv, input, decoder_.hidden, step.tokens, {queries, width, TP_STORE, 0}, workspace_.as<void>());
  const tp_token_rows key_rows{keys, width, TP_F32}, value_rows{keys + a.kv_heads * a.key_dim, width, TP_F32};
  share_rows(team, step.tokens, [&](int token) {
    turn(layer, token);
    kernels().attention->write(a, cache_index_.as<int64_t>()[token], key_rows, value_rows, token);
  });
  const tp_attention_rows rows{first_tokens_.as<int32_t>(), step.num_new, step.context_lens, step.tables, step.slots,
                               step.table_stride, step.rows};
  const tp_token_rows results{attended_.as<void>(), layer.out.inputs, input_type(layer.out)};
  attend(team, a, rows, {queries, width, TP_F32}, results, workspace_.as<void>());
}

// Norms and rotary embedding of a token's queries and keys, in place.
void Program::turn(const tp_layer& layer, int token) {
  const PointwiseKernels& kernel = *kernels().pointwise;
  const tp_attention& a = layer.attention;
  float* queries = qkv_.as<float>() + size_t(token) * layer.qkv.outputs;
  float* keys = queries + a.heads * a.key_dim;
  const auto normalize = [&](const tp_norm& norm, float* values, int count) {
    for (int i = 0; norm.weight && i < count; i += norm.size)
      kernel.rms_norm(values + i, TP_F32, values + i, norm.weight, norm.eps, norm.size);
  };
  normalize(layer.query_norm, queries, a.heads * a.key_dim);
  normalize(layer.key_norm, keys, a.kv_heads * a.key_dim);
  const size_t at = size_t(positions_.as<int32_t>()[token]) * layer.rotary_pairs;
  kernel.rotary(queries, a.heads + a.kv_heads, a.key_dim, layer.cosines + at, layer.sines + at, layer.rotary_pairs);
}

// The last layer's output matters for the wanted tokens only: gathers what they have so far.
Program::Rows Program::keep_wanted(Team& team, const tp_layer& layer, const tp_step& step) {
  const size_t hidden = decoder_.hidden * sizeof(float), width = layer.out.inputs * input_bytes(layer.out);
  share_rows(team, step.num_wanted, [&](int i) {
    const size_t from = step.wanted[i];
    memcpy(wanted_.as<char>() + i * hidden, residual_.as<char>() + from * hidden, hidden);
    memcpy(wanted_attended_.as<char>() + i * width, attended_.as<char>() + from * width, width);
  });
  return {wanted_.as<float>(), step.num_wanted};
}

void Program::mlp(Team& team, const tp_layer& layer, Rows rows) {
  const void* input = normed(team, layer.mlp_norm, rows, layer.gate_up);
  linear(team, layer.gate_up, input, decoder_.hidden, rows.count,
         {gated_.as<void>(), layer.down.inputs, TP_GATED, decoder_.activation}, workspace_.as<void>());
  add(team, layer.down, layer.output_norm, gated_.as<void>(), rows);
}

void Program::head(Team& team, int first, int count, float* out) {
  const Rows rows{wanted_.as<float>() + size_t(first) * decoder_.hidden, count};
  const int vocab = decoder_.head.outputs;
  const void* input = normed(team, decoder_.norm, rows, decoder_.head);
  linear(team, decoder_.head, input, decoder_.hidden, count, {out, vocab, TP_STORE, 0}, workspace_.as<void>());
  if (decoder_.logit_scale == 1 && decoder_.logit_softcap == 0) return;
  share_rows(team, count, [&](int i) {
    kernels().pointwise->cap(out + size_t(i) * vocab, decoder_.logit_scale, decoder_.logit_softcap, vocab);
  });
}

// The rows through the norm, as `reader` reads them. Of few rows each thread makes its own copy: meeting takes longer.
const void* Program::normed(Team& team, const tp_norm& norm, Rows rows, const tp_linear_weight& reader) {
  const PointwiseKernels& kernel = *kernels().pointwise;
  const int hidden = decoder_.hidden, type = input_type(reader);
  if (!norm.weight && type == TP_F32) return rows.data;
  const bool few = rows.count <= kFewRows;
  char* to = normed_.as<char>();
  if (few) to = few_normed_.as<char>() + size_t(team.thread) * kFewRows * hidden * sizeof(float);
  const auto one = [&](int i) {
    const float* row = rows.data + size_t(i) * hidden;
    char* out = to + size_t(i) * hidden * input_bytes(reader);
    if (norm.weight) kernel.rms_norm(out, type, row, norm.weight, norm.eps, hidden);
    else kernel.to_bf16(reinterpret_cast<uint16_t*>(out), row, hidden);
  };
  if (!few) share_rows(team, rows.count, one);
  else for (int i = 0; i < rows.count; ++i) one(i);
  return to;
}

// rows += residual_scale * norm(weight x input)
void Program::add(Team& team, const tp_linear_weight& weight, const tp_norm& norm, const void* input, Rows rows) {
  const PointwiseKernels& kernel = *kernels().pointwise;
  const int64_t hidden = decoder_.hidden;
  const float scale = decoder_.residual_scale;
  if (!norm.weight && scale == 1) {
    linear(team, weight, input, weight.inputs, rows.count, {rows.data, hidden, TP_ADD, 0}, workspace_.as<void>());
    return;
  }
  float* delta = delta_.as<float>();
  linear(team, weight, input, weight.inputs, rows.count, {delta, hidden, TP_STORE, 0}, workspace_.as<void>());
  share_rows(team, rows.count, [&](int i) {
    float *to = rows.data + i * hidden, *from = delta + i * hidden;
    if (norm.weight) kernel.add_rms_norm(to, scale, from, norm.weight, norm.eps, hidden);
    else for (int j = 0; j < hidden; ++j) to[j] += scale * from[j];
  });
}

}  // namespace tp

struct tp_program {
  tp::Program program;
};

extern "C" {

TP_API tp_program* tp_program_create(const tp_decoder* decoder) {
  try {
    return new tp_program{tp::Program(*decoder)};
  } catch (const std::bad_alloc& error) {
    tp::stop("no memory for a program", error.what());
  }
}

TP_API void tp_program_destroy(tp_program* program) { delete program; }

TP_API size_t tp_program_scratch_bytes(const tp_program* program) { return program->program.scratch_bytes(); }

TP_API void tp_program_step(tp_program* program, const tp_step* step) { program->program.step(*step); }

TP_API void tp_program_logits(tp_program* program, int first, int count, float* logits) {
  program->program.logits(first, count, logits);
}
}
