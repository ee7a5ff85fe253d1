// Vectors of 16 numbers that compile for every tier, and the few operations that need more than the compiler's own.
//
// The compiler would keep a vector that is wider than the machine's registers in memory. So there is none: where a
// register holds less than 16 numbers, they are halves, or halves of halves. Operators mean the same for both; where a
// truth chooses, it is `select`, and other readings of the same bits are `as`. Everything is in an anonymous namespace,
// see isa.h.
#pragma once

#include <stdint.h>
#include <string.h>

#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels/scalar.h"
#include "tokenplane_cpu.h"

namespace tp {
namespace {

#if defined(__AVX512F__)
constexpr int kRegisterBytes = 64;
#elif defined(__AVX2__)
constexpr int kRegisterBytes = 32;
#else
constexpr int kRegisterBytes = 16;
#endif

// --- Types ----------------------------------------------------------------------------------------------------------

template <class Element, int kCount>
struct RegisterOf {
  typedef Element Type __attribute__((vector_size(kCount * sizeof(Element))));
};
template <class Element, int kCount>
using Register = typename RegisterOf<Element, kCount>::Type;

template <class Vector>
using ElementOf = std::decay_t<decltype(std::declval<Vector>()[0])>;

template <class Vector>
constexpr int kCountOf = sizeof(Vector) / sizeof(ElementOf<Vector>);

template <class Half>
struct Halves {
  using Element = ElementOf<Half>;
  Half low, high;

  Element operator[](int i) const { return i < kCountOf<Half> ? low[i] : high[i - kCountOf<Half>]; }
};

template <class Element, int kCount, bool kFits = (kCount * sizeof(Element) <= kRegisterBytes)>
struct WideOf {
  using Type = Register<Element, kCount>;
};
template <class Element, int kCount>
struct WideOf<Element, kCount, false> {
  using Type = Halves<typename WideOf<Element, kCount / 2>::Type>;
};
template <class Element>
using Wide = typename WideOf<Element, kLanes>::Type;

using F32x16 = Wide<float>;
using F64x16 = Wide<double>;
using I32x16 = Wide<int32_t>;
using U32x16 = Wide<uint32_t>;

template <class Vector>
constexpr bool kIsHalves = false;
template <class Half>
constexpr bool kIsHalves<Halves<Half>> = true;

// --- Operators of halves --------------------------------------------------------------------------------------------

template <class Half>
inline Halves<Half> both(Half low, Half high) {
  return {low, high};
}

#define TP_OPERATOR(op)                                                                  \
  template <class Half, class Other>                                                     \
  inline auto operator op(const Halves<Half>& a, const Halves<Other>& b) {               \
    return both(a.low op b.low, a.high op b.high);                                       \
  }                                                                                      \
  template <class Half>                                                                  \
  inline auto operator op(const Halves<Half>& a, typename Halves<Half>::Element b) {     \
    return both(a.low op b, a.high op b);                                                \
  }                                                                                      \
  template <class Half>                                                                  \
  inline auto operator op(typename Halves<Half>::Element a, const Halves<Half>& b) {     \
    return both(a op b.low, a op b.high);                                                \
  }
TP_OPERATOR(+)
TP_OPERATOR(-)
TP_OPERATOR(*)
TP_OPERATOR(/)
TP_OPERATOR(&)
TP_OPERATOR(|)
TP_OPERATOR(<<)
TP_OPERATOR(>>)
TP_OPERATOR(<)
TP_OPERATOR(<=)
TP_OPERATOR(>)
TP_OPERATOR(>=)
TP_OPERATOR(==)
TP_OPERATOR(!=)
#undef TP_OPERATOR

template <class Half>
inline Halves<Half> operator-(const Halves<Half>& a) {
  return {-a.low, -a.high};
}

template <class Half, class Other>
inline void operator+=(Halves<Half>& a, const Other& b) {
  a = a + b;
}

template <class Half, class Other>
inline void operator-=(Halves<Half>& a, const Other& b) {
  a = a - b;
}

// --- What both kinds need -------------------------------------------------------------------------------------------

// Splits either kind of vector.
template <class Half>
inline Halves<Half> halves_of(const Halves<Half>& v) {
  return v;
}
template <class Vector>
inline auto halves_of(const Vector& v) {
  return bits<Halves<Register<ElementOf<Vector>, kCountOf<Vector> / 2>>>(v);
}

template <class Truth, class Vector>
inline Vector select(const Truth& where, const Vector& yes, const Vector& no) {
  if constexpr (kIsHalves<Vector>) return {select(where.low, yes.low, no.low), select(where.high, yes.high, no.high)};
  else return where ? yes : no;
}

template <class To, class Vector>
inline To as(const Vector& v) {
  if constexpr (kIsHalves<To>) return {as<decltype(To::low)>(v.low), as<decltype(To::low)>(v.high)};
  else return bits<To>(v);
}

// The same numbers in another type.
template <class To, class Vector>
inline To convert(const Vector& v) {
  if constexpr (kIsHalves<To>) {
    const auto from = halves_of(v);
    return {convert<decltype(To::low)>(from.low), convert<decltype(To::low)>(from.high)};
  } else {
    return __builtin_convertvector(v, To);
  }
}

template <class To>
inline To load_as(const void* from) {
  if constexpr (kIsHalves<To>) {
    using Half = decltype(To::low);
    return {load_as<Half>(from), load_as<Half>(static_cast<const char*>(from) + sizeof(Half))};
  } else {
    To out;
    memcpy(&out, from, sizeof out);
    return out;
  }
}

inline F32x16 load(const float* from) { return load_as<F32x16>(from); }

template <class Vector>
inline void store(void* to, const Vector& value) {
  if constexpr (kIsHalves<Vector>) {
    store(to, value.low);
    store(static_cast<char*>(to) + sizeof value.low, value.high);
  } else {
    memcpy(to, &value, sizeof value);
  }
}

inline F32x16 broadcast(float value) { return value - F32x16{}; }
inline U32x16 broadcast(uint32_t value) { return value - U32x16{}; }

alignas(64) constexpr int32_t kLaneNumbers[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
inline I32x16 lane_numbers() { return load_as<I32x16>(kLaneNumbers); }

// Halves are combined until one is left, so that the order is the same for every tier.
template <class Vector, class Combine>
inline float reduce(const Vector& v, Combine&& combine) {
  if constexpr (!kIsHalves<Vector> && kCountOf<Vector> == 4) {
    return combine(combine(v[0], v[2]), combine(v[1], v[3]));
  } else {
    const auto split = halves_of(v);
    return reduce(combine(split.low, split.high), combine);
  }
}

inline float sum(const F32x16& v) {
  return reduce(v, [](auto a, auto b) { return a + b; });
}

inline float largest(const F32x16& v) {
  return reduce(v, [](auto a, auto b) { return select(a > b, a, b); });
}

// Moves the first `count` of 16 values; loaded ones are filled up with zeros.
inline F32x16 load_some(const float* from, int count) {
  if (count >= kLanes) return load(from);
  float out[kLanes] = {};
  memcpy(out, from, size_t(count) * sizeof(float));
  return load(out);
}

inline void store_some(float* to, const F32x16& value, int count) {
  if (count >= kLanes) return store(to, value);
  float all[kLanes];
  store(all, value);
  memcpy(to, all, size_t(count) * sizeof(float));
}

// --- bf16 -----------------------------------------------------------------------------------------------------------

template <class Vector = U32x16>
inline Vector load_words(const uint16_t* from) {
  if constexpr (kIsHalves<Vector>) {
    using Half = decltype(Vector::low);
    return {load_words<Half>(from), load_words<Half>(from + kCountOf<Half>)};
  } else {
    return __builtin_convertvector(load_as<Register<uint16_t, kCountOf<Vector>>>(from), Vector);
  }
}

inline F32x16 load_bf16(const uint16_t* from) { return as<F32x16>(load_words(from) << 16); }

// 16 pairs of bf16, each pair in the 32 bits of a lane: the first ones, and the second.
inline F32x16 first_of_pairs(const U32x16& pairs) { return as<F32x16>(pairs << 16); }
inline F32x16 second_of_pairs(const U32x16& pairs) { return as<F32x16>(pairs & 0xffff0000u); }

template <class Vector>
inline void store_words(uint16_t* to, const Vector& value) {
  if constexpr (kIsHalves<Vector>) {
    store_words(to, value.low);
    store_words(to + kCountOf<decltype(value.low)>, value.high);
  } else {
    store(to, __builtin_convertvector(value, Register<uint16_t, kCountOf<Vector>>));
  }
}

// Rounds as to_bf16 does.
inline void store_bf16(uint16_t* to, const F32x16& value) {
#if defined(__AVX512BF16__)
  store(to, _mm512_cvtneps_pbh((__m512)value));
#else
  const U32x16 bits = as<U32x16>(value);
  const U32x16 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  store_words(to, select(value == value, rounded, (bits >> 16) | 0x40));
#endif
}

inline void store_some(uint16_t* to, const F32x16& value, int count) {
  if (count >= kLanes) return store_bf16(to, value);
  uint16_t all[kLanes];
  store_bf16(all, value);
  memcpy(to, all, size_t(count) * sizeof(uint16_t));
}

// To elements [at, at + count) of TP_F32 or TP_BF16.
inline void store_some(void* to, int type, int64_t at, const F32x16& value, int count) {
  if (type == TP_F32) store_some(static_cast<float*>(to) + at, value, count);
  else store_some(static_cast<uint16_t*>(to) + at, value, count);
}

}  // namespace
}  // namespace tp
