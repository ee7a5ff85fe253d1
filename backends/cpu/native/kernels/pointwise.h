// Row by row kernels: norms, rotary embedding, activations, conversions.
#pragma once

#include <stdint.h>

namespace tp {

struct PointwiseKernels {
  // out[n] = x[n] / sqrt(mean(x^2) + eps) * (offset + weight[n]), computed in f32.
  void (*rms_norm)(float* out, const float* x, const float* weight, float offset, float eps, int n);
};

}  // namespace tp
