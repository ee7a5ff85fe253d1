#include "linear.h"

#include <algorithm>

#include "isa.h"
#include "kernels/linear.h"
#include "stop.h"

namespace tp {
namespace {

constexpr size_t kItemBytes = 32 << 10;  // of weights, at least: taking an item should not be felt

int blocks_per_item(const tp_linear_weight& weight) {
  return int((kItemBytes + block_bytes(weight) - 1) / block_bytes(weight));
}

}  // namespace

size_t linear_workspace_bytes(const tp_linear_weight& weight, int rows) {
  const LinearKernels& kernel = *kernels().linear;
  return kernel.wants_packed(weight, rows) ? kernel.packed_bytes(weight, rows) : 0;
}

void linear(Team& team, const tp_linear_weight& weight, const void* input, int64_t input_stride, int rows,
            const tp_linear_output& out, void* workspace) {
  if (rows == 0) return;
  const LinearKernels& kernel = *kernels().linear;
  LinearInput from{input, input_stride, rows, false};
  if (kernel.wants_packed(weight, rows)) {
    team.share((rows + kernel.group_rows - 1) / kernel.group_rows,
               [&](int group) { kernel.pack_group(weight, from, group, workspace); });
    from = {workspace, padded_inputs(weight), rows, true};
  }
  const int blocks = column_blocks(weight), step = blocks_per_item(weight);
  team.share((blocks + step - 1) / step, [&](int item) {
    kernel.columns(weight, from, item * step, std::min(blocks, (item + 1) * step), out);
  });
}

}  // namespace tp

extern "C" {

TP_API size_t tp_linear_workspace_bytes(const tp_linear_weight* weight, int rows) {
  return tp::linear_workspace_bytes(*weight, rows);
}

TP_API void tp_linear(const tp_linear_weight* weight, const void* input, int64_t input_stride, int rows,
                      const tp_linear_output* out, void* workspace) {
  tp::require((out->epilogue == TP_GATED) == (weight->gated != 0), "tp_linear",
              "TP_GATED goes with gated weights, and they with nothing else");
  tp::pool().run([&](tp::Team& team) { tp::linear(team, *weight, input, input_stride, rows, *out, workspace); });
}
}
