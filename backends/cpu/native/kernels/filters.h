// Filters of sampling without a sort: which of many values are the largest that together reach a weight.
#pragma once

#include <math.h>

#include "kernels/activation.h"
#include "kernels/simd.h"
#include "tokenplane_cpu.h"

namespace tp {
namespace {

constexpr int kFew = TP_MOST_LOGPROBS;  // so many are sorted

// A sum that is exact enough to compare with one in another order: few values in f32, all others in f64.
struct LongSum {
  F64x16 total{};
  F32x16 some{};
  int count = 0;

  void add(F32x16 v) {
    some += v;
    if (++count == 4) flush();
  }
  void flush() {
    total += convert<F64x16>(some);
    some = F32x16{};
    count = 0;
  }
  double get() {
    flush();
    double all = 0;
    for (int i = 0; i < kLanes; ++i) all += total[i];
    return all;
  }
};

inline uint32_t lanes_of(I32x16 truth) {
#if defined(__AVX512DQ__)
  return _mm512_movepi32_mask((__m512i)truth);
#elif defined(__AVX2__)
  return uint32_t(_mm256_movemask_ps((__m256)truth.low) | _mm256_movemask_ps((__m256)truth.high) << 8);
#else
  uint32_t lanes = 0;
  for (int i = 0; i < kLanes; ++i) lanes |= uint32_t(truth[i] & 1) << i;
  return lanes;
#endif
}

// Values at rising ids and what they weigh; both arrays are padded to a multiple of 16, with values of -inf or weights
// of 0.
struct Weighted {
  const float* values;
  const float* weights;  // null: 1 each
  int count;

  F32x16 value(int i) const { return load(values + i); }
  F32x16 weight(int i) const { return weights ? load(weights + i) : broadcast(1.0f); }
};

// Kept are values above `value`, and those equal to it up to the id `last`.
struct Cut {
  float value;
  int last;

  I32x16 keeps(F32x16 v, int first_id) const {
    const I32x16 id = lane_numbers() + first_id;
    return (v > value) | ((v == value) & (id <= last));
  }
};

struct Above {
  double weight;
  int64_t count;
};

inline Above above(const Weighted& all, float limit) {
  LongSum weight;
  I32x16 count{};
  for (int i = 0; i < all.count; i += kLanes) {
    const I32x16 chosen = all.value(i) > limit;
    weight.add(select(chosen, all.weight(i), F32x16{}));
    count -= chosen;
  }
  int64_t counted = 0;
  for (int i = 0; i < kLanes; ++i) counted += count[i];
  return {weight.get(), counted};
}

// Floats in their order as integers.
inline int32_t ordinal(float value) {
  const int32_t word = bits<int32_t>(value);
  return word ^ (word >> 31 & 0x7fffffff);
}

inline float from_ordinal(int32_t order) { return bits<float>(order ^ (order >> 31 & 0x7fffffff)); }

inline float between(float low, float high) {
  const float middle = low + (high - low) * 0.5f;
  if (low >= 0 || !(high - low < 64) || !(middle > low && middle < high))
    return from_ordinal(int32_t((int64_t(ordinal(low)) + ordinal(high)) >> 1));
  return middle;
}

struct Entry {
  float value, weight;
  int id;
};

// Best first, lower ids first on a tie. A shell sort: few entries, no recursion.
inline void sort(Entry* entries, int count) {
  const auto before = [](const Entry& a, const Entry& b) {
    return a.value > b.value || (a.value == b.value && a.id < b.id);
  };
  const int gaps[] = {701, 301, 132, 57, 23, 10, 4, 1};
  for (const int gap : gaps) {
    for (int i = gap; i < count; ++i) {
      const Entry moved = entries[i];
      int j = i;
      for (; j >= gap && before(moved, entries[j - gap]); j -= gap) entries[j] = entries[j - gap];
      entries[j] = moved;
    }
  }
}

// Calls body(entry) for all values in (low, high], by rising ids, until it returns true.
template <class Body>
inline void each_between(const Weighted& all, float low, float high, Body&& body) {
  for (int i = 0; i < all.count; i += kLanes) {
    const F32x16 v = all.value(i);
    for (uint32_t lanes = lanes_of((v > low) & (v <= high)); lanes; lanes &= lanes - 1) {
      const int id = i + __builtin_ctz(lanes);
      if (body(Entry{all.values[id], all.weights ? all.weights[id] : 1.0f, id})) return;
    }
  }
}

// The largest values, lower ids first on a tie, that together weigh at least `wanted`; all where they do not reach it.
// `most`: the largest value; few: room for kFew entries.
inline Cut find_cut(const Weighted& all, double wanted, float most, Entry* few) {
  float low = -INFINITY, high = most;
  Above high_above{0, 0}, low_above = above(all, low);
  if (!(low_above.weight > wanted)) return {-INFINITY, -1};
  for (float guess = most - 32; low_above.count - high_above.count > kFew && int64_t(ordinal(high)) - ordinal(low) > 1;
       guess = between(low, high)) {
    if (!(guess > low && guess < high)) guess = from_ordinal(ordinal(high) - 1);
    const Above there = above(all, guess);
    if (there.weight < wanted) high = guess, high_above = there;
    else low = guess, low_above = there;
  }
  Cut cut{high, -1};
  double weight = high_above.weight;
  const auto reaches = [&](const Entry& entry) {
    cut = {entry.value, entry.id};
    return (weight += entry.weight) >= wanted;
  };
  if (low_above.count - high_above.count > kFew) {  // they are all alike
    each_between(all, low, high, reaches);
    return cut;
  }
  int count = 0;
  each_between(all, low, high, [&](const Entry& entry) { return few[count++] = entry, false; });
  sort(few, count);
  for (int i = 0; i < count && !reaches(few[i]); ++i) {
  }
  return cut;
}

}  // namespace
}  // namespace tp
