// Rows of the embedding, as stored or out of a packed weight that the output layer shares.
#pragma once

#include "tokenplane_cpu.h"

namespace tp {

// row[hidden] = embedding of the token * embedding_scale; NaN for an id that the vocabulary does not have.
void embedding_row(const tp_decoder& decoder, int token_id, float* row);

}  // namespace tp
