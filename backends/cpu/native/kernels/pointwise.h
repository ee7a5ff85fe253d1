// Row by row kernels: norms, rotary embedding, conversions. All compute in f32.
#pragma once

#include <stdint.h>

namespace tp {

// Types are TP_F32, TP_BF16 or TP_F16 (embed only).
struct PointwiseKernels {
  // out[n] = x[n] / sqrt(mean(x^2) + eps) * weight[n]. out may be x.
  void (*rms_norm)(void* out, int out_type, const float* x, const float* weight, float eps, int n);
  // residual[n] += scale * (x[n] / sqrt(mean(x^2) + eps) * weight[n])
  void (*add_rms_norm)(float* residual, float scale, const float* x, const float* weight, float eps, int n);
  // Turns the first 2 * pairs dimensions of each of `heads` heads, which lie `head_stride` apart, in place: dimension i
  // with i + pairs. cosines[pairs] and sines[pairs] are of the token's position.
  void (*rotary)(float* heads_of_token, int heads, int head_stride, const float* cosines, const float* sines,
                 int pairs);
  // out[n] = row[n] * scale, from a row of an embedding of any type.
  void (*embed)(float* out, const void* row, int row_type, float scale, int n);
  // out[n] = x[n] in bf16.
  void (*to_bf16)(uint16_t* out, const float* x, int n);
  // x[n] = cap * tanh(x[n] * scale / cap); cap 0: x[n] *= scale.
  void (*cap)(float* x, float scale, float cap, int n);
};

}  // namespace tp
