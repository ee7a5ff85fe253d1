from __future__ import annotations

import torch

torch.set_num_threads(1)  # two OpenMP threads on a busy machine are slower than one
