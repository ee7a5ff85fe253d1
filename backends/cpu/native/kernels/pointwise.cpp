#include "kernels/pointwise.h"

#include <math.h>

#include "kernels/simd.h"

namespace tp {
namespace {

void rms_norm(float* out, const float* x, const float* weight, float offset, float eps, int n) {
  F32x16 squares{};
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const F32x16 v = load(x + i);
    squares += v * v;
  }
  float total = sum(squares);
  for (int j = i; j < n; ++j) total += x[j] * x[j];
  const float scale = 1.0f / sqrtf(total / static_cast<float>(n) + eps);
  for (int j = 0; j < n; ++j) out[j] = x[j] * scale * (offset + weight[j]);
}

}  // namespace

namespace TP_TIER {
extern const PointwiseKernels pointwise;
const PointwiseKernels pointwise = {rms_norm};
}  // namespace TP_TIER

}  // namespace tp
