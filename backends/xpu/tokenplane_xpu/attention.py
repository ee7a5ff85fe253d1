"""Attention kernels for Intel GPUs, in the order they are tried: Intel's for vLLM (SYCL), Triton, torch.

Call surface: vllm-xpu-kernels 0.1.15 (flash_attn_interface.py). For shapes that its build lacks the function falls back
to torch and leaves `out` as it was, which the trial batches of choice.py notice.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenplane_torch.choice import Candidate, Unavailable
from tokenplane_torch.composed import LAST_CANDIDATES, with_writer
from tokenplane_torch.device import TorchDevice
from tokenplane_torch.kernels import AttentionKernels, LayerNeed
from tokenplane_torch.probing import Serves, library
from tokenplane_torch.varlen import Varlen, VarlenCall

SERVES = Serves(block_multiple=64, sinks=True)


def _vllm_xpu_kernels(needs: Sequence[LayerNeed], device: TorchDevice) -> AttentionKernels:
    module = library("vllm_xpu_kernels.flash_attn_interface")
    if not module.FA2_AVAILABLE:
        raise Unavailable(f"its binary does not load: {module.FA2_UNAVAILABLE_REASON}")
    SERVES.require(needs, device.block_tokens)

    def attend(call: VarlenCall) -> None:
        module.flash_attn_varlen_func(
            s_aux=call.rule.sinks,
            out=call.out,
            **call.paged_arguments,
        )

    varlen = Varlen(attend).attend
    return with_writer("vllm-xpu-kernels: flash attention", varlen, varlen, device)


CANDIDATES = (Candidate("vllm-xpu-kernels", _vllm_xpu_kernels), *LAST_CANDIDATES)
