// Writing tokens into the paged cache, and reading the heads that a step brings.
#pragma once

#include <math.h>
#include <string.h>

#include "kernels/attention.h"
#include "kernels/simd.h"

namespace tp {
namespace {

// --- What a step brings ---------------------------------------------------------------------------------------------

inline float element(const tp_token_rows& rows, int64_t at) {
  if (rows.type == TP_F32) return static_cast<const float*>(rows.data)[at];
  return from_bf16(static_cast<const uint16_t*>(rows.data)[at]);
}

// bf16 of one head's elements, `count` of them and a zero where count is odd.
void round_head(uint16_t* out, const tp_token_rows& rows, int64_t at, int count) {
  if (rows.type == TP_BF16) {
    memcpy(out, static_cast<const uint16_t*>(rows.data) + at, size_t(count) * 2);
  } else {
    const float* from = static_cast<const float*>(rows.data) + at;
    for (int i = 0; i < count; i += kLanes) store_some(out + i, load_some(from + i, count - i), count - i);
  }
  if (count % 2) out[count] = 0;
}

// --- Writing --------------------------------------------------------------------------------------------------------

// Where a token's elements lie in a head of a block: element d of token t.
inline size_t key_place(const tp_attention& l, int t, int d) {
  const size_t group = size_t(t / kGroupTokens) * key_steps(l) * kGroupTokens;
  if (l.type == TP_F32) return group + size_t(d) * kGroupTokens + t % kGroupTokens;
  return (group + size_t(d / 2) * kGroupTokens + t % kGroupTokens) * 2 + d % 2;
}

inline size_t value_place(const tp_attention& l, int t, int d) {
  if (l.type == TP_F32) return size_t(t) * padded_value_dim(l) + d;
  return (size_t(t / 2) * padded_value_dim(l) + d) * 2 + t % 2;
}

// Of a value in [-127, 127]; 0 of a NaN.
inline int8_t to_int8(float value) { return value == value ? int8_t(nearbyintf(value)) : int8_t(0); }

// Writes `count` elements of a head. place(d): where element d goes; scales: of the block's tokens, int8 only.
template <class Place>
void write_head(const tp_attention& l, uint8_t* head, size_t scales_at, int token, const tp_token_rows& from,
                int64_t at, int count, Place&& place) {
  if (l.type == TP_F32) {
    float* out = reinterpret_cast<float*>(head);
    for (int d = 0; d < count; ++d) out[place(d)] = element(from, at + d);
  } else if (l.type == TP_BF16) {
    uint16_t* out = reinterpret_cast<uint16_t*>(head);
    for (int d = 0; d < count; d += kLanes) {
      const int some = count - d < kLanes ? count - d : kLanes;
      uint16_t values[kLanes];
      round_head(values, from, at + d, some);
      for (int i = 0; i < some; ++i) out[place(d + i)] = values[i];
    }
  } else {
    float most = 0;
    for (int d = 0; d < count; ++d) {
      const float size = fabsf(element(from, at + d));
      if (size > most) most = size;
    }
    // Of what is tiny 127 / most would be inf. An inf makes the scale one, and so the whole head shows it.
    const float scale = most / 127.0f, inverse = most > 1e-36f ? 127.0f / most : 0.0f;
    int8_t* out = reinterpret_cast<int8_t*>(head);
    for (int d = 0; d < count; ++d) out[place(d)] = to_int8(element(from, at + d) * inverse);
    memcpy(head + scales_at + token * sizeof(float), &scale, sizeof scale);
  }
}

void write(const tp_attention& l, int64_t index, const tp_token_rows& keys, const tp_token_rows& values, int token) {
  const int64_t block = index / kBlockTokens;
  const int t = int(index % kBlockTokens), odd = l.type == TP_F32 ? 0 : l.key_dim % 2;
  for (int h = 0; h < l.kv_heads; ++h) {
    uint8_t* key = static_cast<uint8_t*>(l.keys) + (block * l.kv_heads + h) * key_head_bytes(l);
    uint8_t* value = static_cast<uint8_t*>(l.values) + (block * l.kv_heads + h) * value_head_bytes(l);
    write_head(l, key, key_head_bytes(l) - kBlockTokens * sizeof(float), t, keys,
               token * keys.stride + int64_t(h) * l.key_dim, l.key_dim, [&](int d) { return key_place(l, t, d); });
    if (odd) memset(key + key_place(l, t, l.key_dim) * (l.type == TP_BF16 ? 2 : 1), 0, l.type == TP_BF16 ? 2 : 1);
    write_head(l, value, value_head_bytes(l) - kBlockTokens * sizeof(float), t, values,
               token * values.stride + int64_t(h) * l.value_dim, l.value_dim,
               [&](int d) { return value_place(l, t, d); });
  }
}

}  // namespace
}  // namespace tp
