// Tiers of instruction sets, and the kernels compiled for each.
//
// A .cpp file in kernels/ is compiled once for each tier with TP_TIER set to its name, and defines its table in
// namespace tp::TP_TIER. Such a file keeps everything else in an anonymous namespace and instantiates no templates of
// the standard library: the linker keeps one copy of those for all tiers, and it may be one this machine cannot run.
#pragma once

namespace tp {

struct AttentionKernels;
struct LinearKernels;
struct PointwiseKernels;
struct SamplingKernels;

// What one tier offers.
struct Kernels {
  const char* isa;
  const AttentionKernels* attention;
  const LinearKernels* linear;
  const PointwiseKernels* pointwise;
  const SamplingKernels* sampling;
};

// Of the tier in use.
const Kernels& kernels();

}  // namespace tp
