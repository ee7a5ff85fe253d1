#include "embedding.h"

#include <math.h>

#include <algorithm>

#include "isa.h"
#include "kernels/linear.h"
#include "kernels/pointwise.h"

namespace tp {
namespace {

// Output `output` of a packed f32 or bf16 weight that is not gated.
void unpack(const tp_linear_weight& weight, int output, float scale, float* row) {
  const char* block = static_cast<const char*>(weight.values) + output / kBlockColumns * block_bytes(weight);
  const int column = output % kBlockColumns;
  for (int k = 0; k < weight.inputs; ++k)
    row[k] = element(block, weight.type, plain_place(weight, column, k)) * scale;
}

}  // namespace

void embedding_row(const tp_decoder& decoder, int token_id, float* row) {
  if (token_id < 0 || token_id >= decoder.head.outputs) {
    std::fill(row, row + decoder.hidden, NAN);
    return;
  }
  if (!decoder.embedding) return unpack(decoder.head, token_id, decoder.embedding_scale, row);
  const size_t row_bytes = decoder.hidden * element_bytes(decoder.embedding_type);
  const char* stored = static_cast<const char*>(decoder.embedding) + token_id * row_bytes;
  kernels().pointwise->embed(row, stored, decoder.embedding_type, decoder.embedding_scale, decoder.hidden);
}

}  // namespace tp
