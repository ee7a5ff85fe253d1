#include "isa.h"

#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "tokenplane_cpu.h"

namespace tp {

#define TP_DECLARE(tier)                         \
  namespace tier {                               \
  extern const AttentionKernels attention;       \
  extern const LinearKernels linear;             \
  extern const PointwiseKernels pointwise;       \
  extern const SamplingKernels sampling;         \
  }
#define TP_TABLE(tier) Kernels{#tier, &tier::attention, &tier::linear, &tier::pointwise, &tier::sampling}

TP_DECLARE(generic)
#if TP_HAS_amx
TP_DECLARE(amx_emulated)
TP_DECLARE(avx2)
TP_DECLARE(avx512)
TP_DECLARE(avx512_bf16)
TP_DECLARE(amx)
#endif

namespace {

#if defined(__x86_64__)
// The kernel hands out the tiles' 8 KiB of state on request only (Linux, Documentation/arch/x86/xstate.rst).
bool may_use_tiles() {
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  const unsigned wanted = 1u << 22 | 1u << 24;  // amx-bf16, amx-tile
  if ((edx & wanted) != wanted) return false;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

struct Tier {
  Kernels kernels;
  bool (*runs)();
};

#if TP_HAS_amx
// Each tier needs what CMakeLists.txt compiles it for, and so all that the one below needs.
#if !defined(__clang__) && __GNUC__ >= 12
bool runs_avx2() { return __builtin_cpu_supports("x86-64-v3"); }

bool runs_avx512() { return runs_avx2() && __builtin_cpu_supports("x86-64-v4"); }
#else  // which know no levels; no processor has these and lacks the rest
bool runs_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("bmi2");
}

bool runs_avx512() {
  return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512cd");
}
#endif

bool runs_avx512_bf16() {
  return runs_avx512() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") &&
         __builtin_cpu_supports("avx512vbmi");
}

bool runs_amx() { return runs_avx512_bf16() && may_use_tiles(); }
#endif

// Weakest first.
const Tier tiers[] = {
#if TP_HAS_amx
    {TP_TABLE(amx_emulated), runs_avx2},
#endif
    {TP_TABLE(generic), [] { return true; }},
#if TP_HAS_amx
    {TP_TABLE(avx2), runs_avx2},
    {TP_TABLE(avx512), runs_avx512},
    {TP_TABLE(avx512_bf16), runs_avx512_bf16},
    {TP_TABLE(amx), runs_amx},
#endif
};

const Tier* best() {
  static const Tier* found = [] {
    const Tier* last = tiers;
    for (const Tier& tier : tiers)
      if (tier.runs()) last = &tier;
    return last;
  }();
  return found;
}

const Tier* in_use = nullptr;

}  // namespace

const Kernels& kernels() { return (in_use ? in_use : best())->kernels; }

}  // namespace tp

extern "C" {

TP_API int tp_abi(void) { return TP_ABI; }

TP_API const char* tp_best_isa(void) { return tp::best()->kernels.isa; }

TP_API const char* tp_isa(void) { return tp::kernels().isa; }

TP_API int tp_set_isa(const char* name) {
  for (const tp::Tier& tier : tp::tiers) {
    if (strcmp(tier.kernels.isa, name) == 0 && tier.runs()) {
      tp::in_use = &tier;
      return 0;
    }
  }
  return -1;
}
}
