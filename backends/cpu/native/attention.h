// Attention over the paged cache: writing keys and values, and attending to them.
//
// Batch invariance: what a query gets is the same bits whatever else is in the step, however its prompt was cut into
// chunks, and however many threads compute. Keys are taken in spans that begin at multiples of kSpanKeys (counted from
// the sequence's beginning); spans are folded into the result one after the other.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "team.h"
#include "tokenplane_cpu.h"

namespace tp {

// Whether there is such attention: its heads share KV heads, and its cache is of a type that there is.
bool is_attention(const tp_attention& layer);

// Bytes of one block of the cache, over all its heads.
size_t key_block_bytes(const tp_attention& layer);
size_t value_block_bytes(const tp_attention& layer);

// Writes the keys [kv_heads, key_dim] and values [kv_heads, value_dim] of each token to its place in the cache:
// index[token] = block id * TP_KV_BLOCK_TOKENS + place in the block. Ends with a barrier.
void write_kv(Team& team, const tp_attention& layer, const tp_token_rows& keys, const tp_token_rows& values,
              const int64_t* index, int tokens);

// Bytes of memory, 64-byte aligned and shared by the threads, for rows that see at most that many keys.
size_t attention_workspace_bytes(const tp_attention& layer, int most_keys, int threads);

// Causal attention of the rows' tokens, whose own keys and values are in the cache already. query: [heads, key_dim] of
// each token of the step, out: [heads, value_dim]; tokens of no row are left alone. Ends with a barrier.
void attend(Team& team, const tp_attention& layer, const tp_attention_rows& rows, const tp_token_rows& query,
            const tp_token_rows& out, void* workspace);

}  // namespace tp
