"""LoRA adapters as the peft library writes them, and the model as peft computes it with one."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import torch
import transformers


def load_base(folder: Path) -> Any:
    """The model in a folder by transformers, in float32; no token stops it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config = transformers.GenerationConfig(pad_token_id=0)
    return model.eval()


def write_peft_adapter(base: Path, folder: Path, seed: int, scale: float, **config: Any) -> Path:
    """Write a random adapter for the model in `base`; config: fields of peft's LoraConfig. Returns the folder."""
    torch.manual_seed(seed)
    with _without_future_warnings():
        adapted = peft.get_peft_model(load_base(base), peft.LoraConfig(**config, init_lora_weights=False))
    for key, parameter in adapted.named_parameters():
        if "lora_" in key:
            parameter.data.normal_(0, scale)
    adapted.save_pretrained(str(folder))
    return folder


def peft_greedy(base: Path, adapter: Path | None, prompt_ids: list[int], num_tokens: int) -> list[int]:
    """The greedy tokens after a prompt, by peft; adapter None: by transformers alone."""
    ids = torch.tensor([prompt_ids])
    out = _adapted(base, adapter).generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False
    )
    return [int(token) for token in out[0, len(prompt_ids) :]]


@functools.lru_cache(maxsize=4)
def _adapted(base: Path, adapter: Path | None) -> Any:
    model = load_base(base)
    if adapter is None:
        return model
    with _without_future_warnings():
        return peft.PeftModel.from_pretrained(model, str(adapter)).eval()


@contextlib.contextmanager
def _without_future_warnings() -> Iterator[None]:
    """peft asks transformers for what transformers is about to rename."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield
