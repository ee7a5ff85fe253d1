#include "kernels/sampling.h"

#include <string.h>

#include "kernels/arena.h"
#include "kernels/filters.h"

namespace tp {
namespace {

constexpr int kBlock = 1024;  // ids whose probabilities are summed before the draw looks for its own

// One row while it is drawn. Arrays are padded to a multiple of 16.
struct Row {
  int vocab, padded;
  float* scores;       // adjusted logits, then warped; -inf: cannot be drawn
  float* likelihoods;  // exp(score - most), not normalised
  float* keys;         // what typical_p orders by
  int32_t* counts;     // of penalised tokens
  double* blocks;      // sums of likelihoods
  Entry* few;
  float most;          // the largest score
  double total;        // of likelihoods

  static size_t bytes(int vocab) {
    Row row;
    return row.place(vocab, nullptr);
  }

  size_t place(int size, uint8_t* memory) {
    vocab = size, padded = round_up(size, kLanes);
    Arena arena{memory};
    scores = arena.take<float>(size_t(padded));
    likelihoods = arena.take<float>(size_t(padded));
    keys = arena.take<float>(size_t(padded));
    counts = arena.take<int32_t>(size_t(vocab));
    blocks = arena.take<double>(size_t(padded / kBlock + 1));
    few = arena.take<Entry>(kFew);
    return arena.used;
  }
};

// --- Reading and adjusting logits -----------------------------------------------------------------------------------

inline F32x16 padded_load(const float* logits, int i, int vocab) {
  if (i + kLanes <= vocab) return load(logits + i);
  float some[kLanes];
  store(some, broadcast(-INFINITY));
  memcpy(some, logits + i, size_t(vocab - i) * sizeof(float));
  return load(some);
}

inline F32x16 allowed_only(F32x16 v, const uint32_t* mask, int i) {
  const U32x16 word = broadcast(mask[i / 32] >> (i % 32));
  return select((word >> as<U32x16>(lane_numbers()) & 1u) != 0u, v, broadcast(-INFINITY));
}

// Calls body(i, logits of ids [i, i + 16)), those that the mask forbids as -inf.
template <class Body>
inline void each_logit(const float* logits, int vocab, const uint32_t* mask, Body&& body) {
  for (int i = 0; i < vocab; i += kLanes) {
    const F32x16 v = padded_load(logits, i, vocab);
    body(i, mask ? allowed_only(v, mask, i) : v);
  }
}

// -1 where no id has a finite logit above all others': they are NaN, or -inf, or one is inf.
int best_id(const float* logits, int vocab, const uint32_t* mask) {
  F32x16 best = broadcast(-INFINITY);
  I32x16 ids = lane_numbers();
  each_logit(logits, vocab, mask, [&](int i, F32x16 v) {
    const I32x16 better = v > best;
    best = select(better, v, best);
    ids = select(better, lane_numbers() + i, ids);
  });
  const float most = largest(best);
  if (!__builtin_isfinite(most)) return -1;
  int id = vocab - 1;
  for (int lane = 0; lane < kLanes; ++lane)
    if (best[lane] == most && ids[lane] < id) id = ids[lane];
  return id;
}

bool is_id(const Row& r, int32_t id) { return id >= 0 && id < r.vocab; }

// The law's steps 2 and 3.
void penalise(const tp_sampling& s, int row, Row& r) {
  const int64_t history = s.history_rows ? s.history_rows[row] : -1;
  if (history < 0) return;
  const int32_t* ids = s.history_ids + history * s.history_stride;
  const int length = s.history_lengths[history], prompt = s.history_prompts[history];
  const float repetition = s.repetition_penalty[row], presence = s.presence_penalty[row];
  const float frequency = s.frequency_penalty[row];
  for (int i = 0; i < length; ++i)
    if (is_id(r, ids[i])) r.counts[ids[i]] = 0;
  for (int i = prompt; i < length; ++i)
    if (is_id(r, ids[i])) ++r.counts[ids[i]];
  for (int i = 0; i < length; ++i) {
    const int id = ids[i], count = is_id(r, id) ? r.counts[id] : -1;
    if (count < 0) continue;  // done already, or no logit is its own
    float& score = r.scores[id];
    if (repetition != 1) score = score > 0 ? score / repetition : score * repetition;
    if (count > 0) score -= presence + frequency * static_cast<float>(count);
    r.counts[id] = -1;
  }
}

void add_bias(const tp_sampling& s, int row, Row& r) {
  if (!s.bias_starts) return;
  for (int i = s.bias_starts[row]; i < s.bias_starts[row + 1]; ++i)
    if (is_id(r, s.bias_ids[i])) r.scores[s.bias_ids[i]] += s.bias_values[i];
}

// --- Warping --------------------------------------------------------------------------------------------------------

void measure(Row& r) {
  F32x16 best = broadcast(-INFINITY);
  for (int i = 0; i < r.padded; i += kLanes) {
    const F32x16 v = load(r.scores + i);
    best = select(v > best, v, best);
  }
  r.most = largest(best);
}

inline F32x16 likelihood(F32x16 score, float most) {
  const F32x16 below = score - most;
  return select(below > -87.0f, exponential(below), F32x16{});
}

void weigh(Row& r) {
  r.total = 0;
  for (int start = 0; start < r.padded; start += kBlock) {
    const int end = smaller(start + kBlock, r.padded);
    LongSum sum;
    for (int i = start; i < end; i += kLanes) {
      const F32x16 v = likelihood(load(r.scores + i), r.most);
      store(r.likelihoods + i, v);
      sum.add(v);
    }
    r.total += r.blocks[start / kBlock] = sum.get();
  }
}

void keep(Row& r, const float* keys, const Cut& cut) {
  for (int i = 0; i < r.padded; i += kLanes)
    store(r.scores + i, select(cut.keeps(load(keys + i), i), load(r.scores + i), broadcast(-INFINITY)));
}

void keep_best(Row& r, int k) { keep(r, r.scores, find_cut({r.scores, nullptr, r.padded}, k, r.most, r.few)); }

void keep_nucleus(Row& r, float mass) {
  weigh(r);
  keep(r, r.likelihoods, find_cut({r.likelihoods, r.likelihoods, r.padded}, mass * r.total, 1.0f, r.few));
}

void keep_typical(Row& r, float mass) {
  weigh(r);
  const float log_total = static_cast<float>(log(r.total));
  LongSum sum;
  for (int i = 0; i < r.padded; i += kLanes) {
    const F32x16 weight = load(r.likelihoods + i);
    sum.add(select(weight > 0, weight * (log_total - (load(r.scores + i) - r.most)), F32x16{}));
  }
  const float entropy = static_cast<float>(sum.get() / r.total);
  F32x16 best = broadcast(-INFINITY);
  for (int i = 0; i < r.padded; i += kLanes) {
    const F32x16 off = log_total - (load(r.scores + i) - r.most) - entropy;
    const F32x16 key = select(load(r.likelihoods + i) > 0, select(off < 0, off, -off), broadcast(-INFINITY));
    best = select(key > best, key, best);
    store(r.keys + i, key);
  }
  keep(r, r.keys, find_cut({r.keys, r.likelihoods, r.padded}, mass * r.total, largest(best), r.few));
  measure(r);
}

void keep_likely(Row& r, float share) {
  const float least = r.most + logf(share);
  for (int i = 0; i < r.padded; i += kLanes) {
    const F32x16 v = load(r.scores + i);
    store(r.scores + i, select(v >= least, v, broadcast(-INFINITY)));
  }
}

// The law's steps 5 and 6; then likelihoods are those of what is left.
void warp(const tp_sampling& s, int row, Row& r) {
  const float temperature = s.temperature[row];
  for (int i = 0; i < r.padded; i += kLanes) store(r.scores + i, load(r.scores + i) / temperature);
  measure(r);
  if (s.top_k && s.top_k[row] > 0 && s.top_k[row] < r.vocab) keep_best(r, s.top_k[row]);
  if (s.top_p && s.top_p[row] < 1) keep_nucleus(r, s.top_p[row]);
  if (s.typical_p && s.typical_p[row] < 1) keep_typical(r, s.typical_p[row]);
  if (s.min_p && s.min_p[row] > 0) keep_likely(r, s.min_p[row]);
  weigh(r);
}

// The first id at which the cumulative probability exceeds u; -1 where no id has one: best_id says when.
int drawn(const Row& r, float u) {
  if (!(r.total > 0)) return -1;
  const double wanted = u * r.total;
  double below = 0;
  int start = 0;
  while (start + kBlock < r.padded && !(below + r.blocks[start / kBlock] > wanted)) {
    below += r.blocks[start / kBlock];
    start += kBlock;
  }
  int last = -1;
  for (int id = start; id < r.vocab; ++id) {
    below += r.likelihoods[id];
    if (r.likelihoods[id] > 0) last = id;
    if (below > wanted) return id;
  }
  while (last < 0 && --start >= 0)  // a sum in another order may end a rounding error too early
    if (r.likelihoods[start] > 0) last = start;
  return last;
}

// --- Logprobs -------------------------------------------------------------------------------------------------------

void write_logprobs(const tp_sampling& s, int row, Row& r, int token) {
  const float log_total = static_cast<float>(log(r.total));
  const auto logprob = [&](float score) { return score - r.most - log_total; };
  s.logprobs[row] = logprob(r.scores[token]);
  const int wanted = smaller(smaller(s.num_logprobs[row], r.vocab), smaller(s.width, kFew));
  if (wanted == 0) return;
  const Weighted all{r.scores, nullptr, r.padded};
  const Cut cut = find_cut(all, wanted, r.most, r.few);
  const int64_t at = int64_t(row) * s.width;
  int count = 0;
  for (int i = 0; i < r.padded && count < wanted; i += kLanes) {
    for (uint32_t lanes = lanes_of(cut.keeps(all.value(i), i)); lanes && count < wanted; lanes &= lanes - 1)
      r.few[count++] = {r.scores[i + __builtin_ctz(lanes)], 0, i + __builtin_ctz(lanes)};
  }
  for (int id = 0; count < wanted && id < r.vocab; ++id)  // all that can be drawn are there: ids of probability 0
    if (r.scores[id] == -INFINITY) r.few[count++] = {-INFINITY, 0, id};
  sort(r.few, count);
  for (int i = 0; i < count; ++i)
    s.top_ids[at + i] = r.few[i].id, s.top_logprobs[at + i] = logprob(r.few[i].value);
}

void no_logprobs(const tp_sampling& s, int row) {
  s.logprobs[row] = NAN;
  for (int i = 0; i < s.width; ++i)
    s.top_ids[int64_t(row) * s.width + i] = 0, s.top_logprobs[int64_t(row) * s.width + i] = NAN;
}

// --- A row ----------------------------------------------------------------------------------------------------------

void read_logits(Row& r, const float* logits, const uint32_t* mask) {
  each_logit(logits, r.vocab, mask, [&](int i, F32x16 v) { store(r.scores + i, v); });
}

void draw(const tp_sampling& s, int row, void* scratch) {
  const float* logits = s.logits + row * s.stride;
  const uint32_t* mask = nullptr;
  if (s.mask_rows && s.mask_rows[row] >= 0) mask = s.masks + int64_t(s.mask_rows[row]) * ((s.vocab + 31) / 32);
  const bool greedy = !s.temperature || s.temperature[row] == 0;
  const bool biased = s.bias_starts && s.bias_starts[row] < s.bias_starts[row + 1];
  const bool penalised = s.history_rows && s.history_rows[row] >= 0;
  const bool wants_logprobs = s.logprobs && s.num_logprobs[row] >= 0;
  if (s.logprobs) no_logprobs(s, row);
  if (greedy && !biased && !penalised && !wants_logprobs) {
    s.token_ids[row] = best_id(logits, s.vocab, mask);
    return;
  }
  Row r;
  r.place(s.vocab, static_cast<uint8_t*>(scratch));
  read_logits(r, logits, mask);
  if (biased) add_bias(s, row, r);
  if (penalised) penalise(s, row, r);
  if (greedy) s.token_ids[row] = best_id(r.scores, r.vocab, nullptr);
  else warp(s, row, r), s.token_ids[row] = drawn(r, s.uniforms[row]);
  if (!wants_logprobs || s.token_ids[row] < 0) return;
  if (!s.processed_logprobs || !s.processed_logprobs[row]) read_logits(r, logits, nullptr);
  measure(r);
  weigh(r);
  write_logprobs(s, row, r, s.token_ids[row]);
}

}  // namespace

namespace TP_TIER {
extern const SamplingKernels sampling;
const SamplingKernels sampling = {Row::bytes, draw};
}  // namespace TP_TIER

}  // namespace tp
