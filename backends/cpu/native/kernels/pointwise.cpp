#include "kernels/pointwise.h"

#include <math.h>

#include "kernels/activation.h"
#include "kernels/simd.h"
#include "tokenplane_cpu.h"

namespace tp {
namespace {

// Vectors of 16 of the n values at x; the last is filled up with zeros.
template <class Body>
inline void each_vector(const float* x, int n, Body&& body) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, kLanes, load(x + i));
  if (i < n) body(i, n - i, load_some(x + i, n - i));
}

template <class Body>
inline float summed(const float* x, int n, Body&& body) {
  F32x16 total{};
  each_vector(x, n, [&](int, int count, F32x16 v) { total += body(count, v); });
  return sum(total);
}

inline float inverse_rms(const float* x, float eps, int n) {
  const float squares = summed(x, n, [](int, F32x16 v) { return v * v; });
  return 1.0f / sqrtf(squares / static_cast<float>(n) + eps);
}

void rms_norm(void* out, int out_type, const float* x, const float* weight, float eps, int n) {
  const float scale = inverse_rms(x, eps, n);
  each_vector(x, n, [&](int i, int count, F32x16 v) {
    store_some(out, out_type, i, v * scale * load_some(weight + i, count), count);
  });
}

void add_rms_norm(float* residual, float scale, const float* x, const float* weight, float eps, int n) {
  const float by = inverse_rms(x, eps, n);
  each_vector(x, n, [&](int i, int count, F32x16 v) {
    const F32x16 normed = v * by * load_some(weight + i, count);
    store_some(residual + i, load_some(residual + i, count) + normed * scale, count);
  });
}

void turn(float* x, const float* cosines, const float* sines, int pairs) {
  each_vector(x, pairs, [&](int i, int count, F32x16 first) {
    const F32x16 second = load_some(x + pairs + i, count);
    const F32x16 cosine = load_some(cosines + i, count), sine = load_some(sines + i, count);
    store_some(x + i, first * cosine - second * sine, count);
    store_some(x + pairs + i, second * cosine + first * sine, count);
  });
}

void rotary(float* heads_of_token, int heads, int head_stride, const float* cosines, const float* sines, int pairs) {
  for (int head = 0; head < heads; ++head)
    turn(heads_of_token + int64_t(head) * head_stride, cosines, sines, pairs);
}

void embed(float* out, const void* row, int row_type, float scale, int n) {
  if (row_type == TP_F32) {
    each_vector(static_cast<const float*>(row), n,
                [&](int i, int count, F32x16 v) { store_some(out + i, v * scale, count); });
    return;
  }
  int i = 0;
  if (row_type == TP_BF16)
    for (; i + kLanes <= n; i += kLanes) store(out + i, load_bf16(static_cast<const uint16_t*>(row) + i) * scale);
  for (; i < n; ++i) out[i] = element(row, row_type, size_t(i)) * scale;
}

void round_to_bf16(uint16_t* out, const float* x, int n) {
  each_vector(x, n, [&](int i, int count, F32x16 v) { store_some(out + i, v, count); });
}

void cap(float* x, float scale, float limit, int n) {
  each_vector(x, n, [&](int i, int count, F32x16 v) {
    store_some(x + i, limit == 0 ? v * scale : limit * tanh(v * (scale / limit)), count);
  });
}

}  // namespace

namespace TP_TIER {
extern const PointwiseKernels pointwise;
const PointwiseKernels pointwise = {rms_norm, add_rms_norm, rotary, embed, round_to_bf16, cap};
}  // namespace TP_TIER

}  // namespace tp
