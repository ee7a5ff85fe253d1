from __future__ import annotations

import os

# Triton decides when it is imported whether kernels run in its interpreter, and transformers imports it.
os.environ.setdefault("TRITON_INTERPRET", "1")

import torch

torch.set_num_threads(1)  # two OpenMP threads on a busy machine are slower than one
