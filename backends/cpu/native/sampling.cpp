#include "sampling.h"

#include "isa.h"
#include "kernels/sampling.h"

namespace tp {
namespace {

constexpr int64_t kSmallLogits = 1 << 17;  // to go through so many takes less than waking a thread

}  // namespace

size_t sampling_workspace_bytes(int vocab, int threads) { return kernels().sampling->scratch_bytes(vocab) * threads; }

void sample(Team& team, const tp_sampling& rows, void* workspace) {
  const SamplingKernels& kernel = *kernels().sampling;
  uint8_t* scratch = static_cast<uint8_t*>(workspace) + team.thread * kernel.scratch_bytes(rows.vocab);
  team.share(rows.rows, [&](int row) { kernel.draw(rows, row, scratch); });
}

}  // namespace tp

extern "C" {

TP_API size_t tp_sampling_workspace_bytes(int vocab) {
  return tp::sampling_workspace_bytes(vocab, tp::pool().size());
}

TP_API void tp_sample(const tp_sampling* rows, void* workspace) {
  const bool alone = int64_t(rows->rows) * rows->vocab < tp::kSmallLogits;
  tp::pool().run_small(alone, [&](tp::Team& team) { tp::sample(team, *rows, workspace); });
}
}
