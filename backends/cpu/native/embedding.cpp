#include "embedding.h"

#include <math.h>
#include <string.h>

#include <algorithm>

#include "isa.h"
#include "kernels/linear.h"
#include "kernels/pointwise.h"

namespace tp {
namespace {

float from_bf16(uint16_t half) {
  const uint32_t bits = uint32_t(half) << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// Output `output` of a packed f32 or bf16 weight that is not gated.
void unpack(const tp_linear_weight& weight, int output, float scale, float* row) {
  const char* block = static_cast<const char*>(weight.values) + output / kBlockColumns * block_bytes(weight);
  const int column = output % kBlockColumns;
  for (int k = 0; k < weight.inputs; ++k) {
    if (weight.type == TP_F32) row[k] = reinterpret_cast<const float*>(block)[k * kBlockColumns + column] * scale;
    else row[k] = from_bf16(reinterpret_cast<const uint16_t*>(block)[(k / 2 * kBlockColumns + column) * 2 + k % 2]) * scale;
  }
}

}  // namespace

void embedding_row(const tp_decoder& decoder, int token_id, float* row) {
  if (token_id < 0 || token_id >= decoder.head.outputs) {
    std::fill(row, row + decoder.hidden, NAN);
    return;
  }
  if (!decoder.embedding) return unpack(decoder.head, token_id, decoder.embedding_scale, row);
  const size_t bytes = decoder.embedding_type == TP_F32 ? 4 : 2;
  const char* stored = static_cast<const char*>(decoder.embedding) + size_t(token_id) * decoder.hidden * bytes;
  kernels().pointwise->embed(row, stored, decoder.embedding_type, decoder.embedding_scale, decoder.hidden);
}

}  // namespace tp
