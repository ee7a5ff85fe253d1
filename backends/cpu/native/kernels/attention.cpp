// Attending: span after span scores, weights and sums of values; their products are those of attention_tiles.h or
// attention_vectors.h.
#include "kernels/attention.h"

#include <math.h>
#include <string.h>

#include "kernels/activation.h"
#include "kernels/arena.h"
#include "kernels/attention_tiles.h"
#include "kernels/attention_vectors.h"
#include "kernels/attention_write.h"
#include "kernels/simd.h"

namespace tp {
namespace {

// What one call of `attend` works in. Query r is head r % heads of the group, of token r / heads.
struct Scratch {
  int queries, steps, columns, state;
  uint8_t* query;    // [queries][steps] of 4 bytes
  float* scores;     // [queries][kSpanKeys]
  uint8_t* weights;  // [queries][kSpanKeys] f32, or bf16
  float* sums;       // [queries][state] as states
  uint8_t* unpacked;    // int8: keys and values of a span in bf16
  uint8_t* odd_values;  // bf16: values of one block, for TileProducts

  static size_t bytes(const tp_attention& l, int queries) {
    Scratch s;
    return s.place(l, queries, nullptr);
  }

  size_t place(const tp_attention& l, int count, uint8_t* memory) {
    queries = count, steps = key_steps(l), columns = padded_value_dim(l), state = state_floats(l);
    Arena arena{memory};
    query = arena.take<uint8_t>(size_t(count) * steps * 4);
    scores = arena.take<float>(size_t(count) * kSpanKeys);
    weights = arena.take<uint8_t>(size_t(count) * kSpanKeys * 4);
    sums = arena.take<float>(size_t(count) * state);
    unpacked = l.type == TP_INT8 ? arena.take<uint8_t>((size_t(steps) * 4 + columns * 2) * kSpanKeys) : nullptr;
    odd_values = l.type == TP_BF16 ? arena.take<uint8_t>(size_t(columns) * kBlockTokens * 2) : nullptr;
    return arena.used;
  }
};

void load_queries(const AttentionTask& t, Scratch& s) {
  const tp_attention& l = *t.layer;
  const int heads = group_heads(l);
  for (int r = 0; r < s.queries; ++r) {
    const int64_t at = r / heads * t.query.stride + int64_t(t.kv_head * heads + r % heads) * l.key_dim;
    uint8_t* to = s.query + size_t(r) * s.steps * 4;
    if (l.type != TP_F32) {
      round_head(reinterpret_cast<uint16_t*>(to), t.query, at, l.key_dim);
    } else {
      float* out = reinterpret_cast<float*>(to);
      for (int d = 0; d < l.key_dim; ++d) out[d] = element(t.query, at + d);
    }
  }
}

// The keys of one span that at least one of the task's queries sees, and where they lie. `next`: those of the following
// span, where there are any.
struct Span {
  int begin, end;                          // relative to the span
  const uint8_t* keys[2 * kSpanBlocks];    // of each group of 16
  const uint8_t* next_keys[2 * kSpanBlocks];
  const uint8_t* values[kSpanBlocks];      // of each block
  const uint8_t* next_values[kSpanBlocks];
  const float* key_scales[kSpanBlocks];    // int8 only
  const float* value_scales[kSpanBlocks];

  int first_block() const { return begin / kBlockTokens; }
  int last_block() const { return (end - 1) / kBlockTokens + 1; }
};

inline F32x16 load_int8(const uint8_t* from) {
#if defined(__AVX512F__)
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return (F32x16)_mm512_maskz_cvtepi32_ps(0xffff, _mm512_maskz_cvtepi8_epi32(0xffff, bytes));
#elif defined(__AVX2__)
  const auto half = [](const uint8_t* at) {
    return (Register<float, 8>)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)at)));
  };
  return {half(from), half(from + 8)};
#else
  float out[kLanes];
  for (int i = 0; i < kLanes; ++i) out[i] = static_cast<float>(static_cast<int8_t>(from[i]));
  return load(out);
#endif
}

// next: what is fetched meanwhile. count: a multiple of 64.
inline void int8_to_bf16(const uint8_t* from, const uint8_t* next, size_t count, uint16_t* to) {
  for (size_t i = 0; i < count; i += 64) {
    fetch(next + i);
    for (size_t j = i; j < i + 64; j += kLanes) store_bf16(to + j, load_int8(from + j));  // exact
  }
}

// Brings block b of an int8 span into bf16.
void unpack(const Scratch& s, Span& span, int b) {
  const size_t key_group = size_t(s.steps) * 64, value_block = size_t(s.columns) * kBlockTokens * 2;
  uint8_t* to = s.unpacked + b * (2 * key_group + value_block);
  const uint8_t *keys = span.keys[2 * b], *values = span.values[b];
  span.key_scales[b] = reinterpret_cast<const float*>(keys + key_group);
  span.value_scales[b] = reinterpret_cast<const float*>(values + value_block / 2);
  int8_to_bf16(keys, span.next_keys[2 * b], key_group, reinterpret_cast<uint16_t*>(to));
  int8_to_bf16(values, span.next_values[b], value_block / 2, reinterpret_cast<uint16_t*>(to + 2 * key_group));
  span.keys[2 * b] = span.next_keys[2 * b] = to;
  span.keys[2 * b + 1] = span.next_keys[2 * b + 1] = to + key_group;
  span.values[b] = span.next_values[b] = to + 2 * key_group;
}

Span find_span(const AttentionTask& t, int number, const Scratch& s) {
  const tp_attention& l = *t.layer;
  const int start = number * kSpanKeys, last = t.first_position + t.tokens;
  Span span;
  span.begin = first_seen(l, t.first_position, start);
  span.end = smaller(last - start, kSpanKeys);
  const auto head = [&](int block) { return int64_t(t.table[block]) * l.kv_heads + t.kv_head; };
  const auto keys = [&](int block) { return static_cast<const uint8_t*>(l.keys) + head(block) * key_head_bytes(l); };
  const auto values = [&](int block) {
    return static_cast<const uint8_t*>(l.values) + head(block) * value_head_bytes(l);
  };
  for (int b = span.first_block(); b < span.last_block(); ++b) {
    const int block = number * kSpanBlocks + b, after = block + kSpanBlocks;
    const int next = after * kBlockTokens < last ? after : block;
    span.keys[2 * b] = keys(block), span.keys[2 * b + 1] = keys(block) + size_t(s.steps) * 64;
    span.next_keys[2 * b] = keys(next), span.next_keys[2 * b + 1] = keys(next) + size_t(s.steps) * 64;
    span.values[b] = values(block), span.next_values[b] = values(next);
    if (l.type == TP_INT8) unpack(s, span, b);
  }
  return span;
}

// Scores of one query, of which it sees [begin, end), to weights relative to the largest; others get weight 0.
void weigh(const tp_attention& l, const Span& span, int begin, int end, float* scores, uint8_t* weights, float* most,
           float* total) {
  const I32x16 lanes = lane_numbers();
  const int first = begin / kLanes, last = (end + kLanes - 1) / kLanes;
  F32x16 best = broadcast(-INFINITY), sums{};
  for (int g = first; g < last; ++g) {
    F32x16 v = load(scores + g * kLanes) * l.scaling;
    if (l.type == TP_INT8) v = v * load(span.key_scales[g / 2] + g % 2 * kLanes);
    if (l.softcap != 0) v = l.softcap * tanh(v / l.softcap);
    if (g * kLanes < begin || (g + 1) * kLanes > end) {
      const I32x16 key = lanes + g * kLanes;
      v = select((key >= begin) & (key < end), v, broadcast(-INFINITY));
    }
    best = select(v > best, v, best);
    store(scores + g * kLanes, v);
  }
  *most = largest(best);
  for (int g = span.first_block() * 2; g < span.last_block() * 2; ++g) {
    F32x16 weight{};
    if (g >= first && g < last) {
      const F32x16 v = load(scores + g * kLanes);
      weight = select(v > -INFINITY, exponential(v - *most), F32x16{});
      sums += weight;
      // What nobody wrote may be a NaN.
      if (l.type == TP_INT8)
        weight = select(v > -INFINITY, weight * load(span.value_scales[g / 2] + g % 2 * kLanes), F32x16{});
    }
    if (l.type == TP_F32) store(reinterpret_cast<float*>(weights) + g * kLanes, weight);
    else store_bf16(reinterpret_cast<uint16_t*>(weights) + g * kLanes, weight);
  }
  *total = sum(sums);
}

// state <- state and `later`, whose largest score may be the larger. Sums in this one place, so that they round alike.
__attribute__((noinline)) void fold_one(float* state, const float* later, int columns) {
  const float old_most = state[columns], most = later[columns];
  if (most == -INFINITY) return;
  if (old_most == -INFINITY) {
    memcpy(state, later, size_t(columns + 2) * sizeof(float));
  } else if (most > old_most) {
    const float factor = expf(old_most - most);
    for (int c = 0; c < columns; c += kLanes) store(state + c, load(state + c) * factor + load(later + c));
    state[columns] = most, state[columns + 1] = state[columns + 1] * factor + later[columns + 1];
  } else {
    const float factor = expf(most - old_most);
    for (int c = 0; c < columns; c += kLanes) store(state + c, load(later + c) * factor + load(state + c));
    state[columns + 1] = later[columns + 1] * factor + state[columns + 1];
  }
}

// What a query at `position` sees of a span.
inline void visible(const AttentionTask& t, int number, int position, int* begin, int* end) {
  const int start = number * kSpanKeys;
  *begin = first_seen(*t.layer, position, start);
  *end = smaller(position + 1 - start, kSpanKeys);
}

template <class Products>
void attend_spans(const AttentionTask& t, int first, int last, float* states, Scratch& s, Products& products) {
  constexpr int kWeightBytes = Products::kWeightBytes;
  const tp_attention& l = *t.layer;
  const int heads = group_heads(l);
  for (int number = first; number < last; ++number) {
    const Span span = find_span(t, number, s);
    const int first_block = span.first_block(), first_key = first_block * kBlockTokens;
    products.score(s.query, s.queries, s.steps, span.keys + 2 * first_block, span.next_keys + 2 * first_block,
                   2 * (span.last_block() - first_block), s.scores + first_key, kSpanKeys);
    for (int r = 0; r < s.queries; ++r) {
      float* sums = s.sums + size_t(r) * s.state + s.columns;
      uint8_t* weights = s.weights + size_t(r) * kSpanKeys * kWeightBytes;
      int begin, end;
      visible(t, number, t.first_position + r / heads, &begin, &end);
      if (begin < end) weigh(l, span, begin, end, s.scores + size_t(r) * kSpanKeys, weights, sums, sums + 1);
      else memset(weights, 0, kSpanKeys * kWeightBytes), sums[0] = -INFINITY;
    }
    products.multiply_values(s.weights + size_t(first_key) * kWeightBytes, s.queries, span.values + first_block,
                             span.next_values + first_block, span.end - first_key, s.columns, s.sums, s.state);
    for (int r = 0; r < s.queries; ++r)
      fold_one(states + size_t(r) * s.state, s.sums + size_t(r) * s.state, s.columns);
  }
}

void attend(const AttentionTask& t, int first, int last, float* states, void* memory) {
  Scratch s;
  s.place(*t.layer, t.tokens * group_heads(*t.layer), static_cast<uint8_t*>(memory));
  load_queries(t, s);
  if (t.layer->type == TP_F32) {
    VectorProducts<F32Keys> products;
    return attend_spans(t, first, last, states, s, products);
  }
#if TP_TILES
  TileProducts products(s.queries, s.steps, s.odd_values);
#else
  VectorProducts<Bf16Keys> products;
#endif
  attend_spans(t, first, last, states, s, products);
}

template <class Body>
void each_state(const AttentionTask& t, float* states, Body&& body) {
  const int queries = t.tokens * group_heads(*t.layer);
  for (int r = 0; r < queries; ++r) body(r, states + size_t(r) * state_floats(*t.layer));
}

void clear(const AttentionTask& t, float* states) {
  // The sums as well: where all scores of a query are NaN, nothing is ever folded in, and 0 / 0 is what it gets.
  each_state(t, states, [&](int, float* state) {
    memset(state, 0, size_t(state_floats(*t.layer)) * sizeof(float));
    state[padded_value_dim(*t.layer)] = -INFINITY;
  });
}

void fold(const AttentionTask& t, float* states, const float* later) {
  each_state(t, states, [&](int r, float* state) {
    fold_one(state, later + size_t(r) * state_floats(*t.layer), padded_value_dim(*t.layer));
  });
}

void finish(const AttentionTask& t, const float* states) {
  const tp_attention& l = *t.layer;
  const int columns = padded_value_dim(l), heads = group_heads(l);
  each_state(t, const_cast<float*>(states), [&](int r, const float* state) {
    const int head = t.kv_head * heads + r % heads;
    float factor = 1.0f / state[columns + 1];
    if (l.sinks) {
      const float sink = l.sinks[head], most = fmaxf(sink, state[columns]), own = expf(state[columns] - most);
      factor = own / (state[columns + 1] * own + expf(sink - most));
    }
    const int64_t at = r / heads * t.out.stride + int64_t(head) * l.value_dim;
    for (int d = 0; d < l.value_dim; d += kLanes) {
      store_some(t.out.data, t.out.type, at + d, load(state + d) * factor, l.value_dim - d);
    }
  });
}

}  // namespace

namespace TP_TIER {
extern const AttentionKernels attention;
const AttentionKernels attention = {write, Scratch::bytes, attend, clear, fold, finish};
}  // namespace TP_TIER

}  // namespace tp
