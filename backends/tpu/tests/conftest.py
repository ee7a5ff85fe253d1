from __future__ import annotations

import importlib.util

import torch

torch.set_num_threads(1)  # two OpenMP threads on a busy machine are slower than one

# torch-xla wants a torch of its own, so these tests have an environment of their own: make_xla_cpu_env.py.
collect_ignore = [] if importlib.util.find_spec("torch_xla") else ["xla"]
