"""The CPU's attention kernels: so far the torch twins. A native kernel takes their place here, behind the same seam."""

from __future__ import annotations

from tokenplane_torch.kernels import AttentionKernels, TorchKernels


def kernels() -> AttentionKernels:
    return TorchKernels()
