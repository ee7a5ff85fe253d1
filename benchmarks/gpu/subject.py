"""The backend under test: its device, a model of a size that suits it, and requests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import transformers

from tokenplane_core.backend.errors import BackendError
from tokenplane_core.backend.plugins import ask, load_plugin
from tokenplane_core.backend.records import Device, LoadOptions, ModelSpec
from tokenplane_core.model import describe_model
from tokenplane_torch.backend import TorchBackend
from tokenplane_torch.device import TorchDevice


class SectionFailed(Exception):
    """What a section looked at is wrong."""

    def __init__(self, reason: str, facts: dict[str, object]) -> None:
        super().__init__(reason)
        self.facts = facts


class SectionSkipped(Exception):
    """A section has nothing to look at here; the message says why."""


@dataclass(frozen=True, slots=True)
class Size:
    """A Llama with random weights, and the work it is given."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    feed_forward: int
    vocab: int
    requests: int
    prompt_tokens: int
    new_tokens: int
    copy_bytes: int  # what the bandwidth is measured with
    matmul: int  # rows and columns of what the compute rate is measured with

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def cache_tokens(self) -> int:
        """Room for all requests at once, and some blocks more."""
        return self.requests * (self.prompt_tokens + self.new_tokens + 256)


SIZES = {
    "small": Size(256, 4, 8, 4, 704, 2048, 8, 64, 32, 64 << 20, 1024),
    "1b": Size(2048, 16, 32, 8, 8192, 128256, 64, 512, 128, 1 << 30, 8192),
}


@dataclass(frozen=True, slots=True)
class Subject:
    backend: str
    size_name: str
    rounds: int

    @property
    def size(self) -> Size:
        return SIZES[self.size_name]

    def open(self) -> tuple[Device, TorchDevice]:
        """The first device, opened as `load` would.

        Raises:
            BackendError: there is none, or the plugin is not one of torch's.
        """
        plugin, report = load_plugin(self.backend), ask(self.backend).report
        if not report.devices:
            raise BackendError(f"{self.backend} is {report.status}: {report.reason}")
        if not isinstance(plugin, TorchBackend):
            raise BackendError(f"{self.backend} does not build on tokenplane-torch, which these measurements need")
        return report.devices[0], plugin.open_device(report.devices[0], LoadOptions())

    @contextmanager
    def model(self, device: Device) -> Iterator[ModelSpec]:
        """A folder with the model in the dtype the device prefers, gone afterwards."""
        with TemporaryDirectory() as folder:
            write_llama(self.size, device.dtypes[0], Path(folder))
            yield describe_model(folder, model_id=f"random Llama ({self.size_name})", dtype=device.dtypes[0])

    def prompts(self, count: int, seed: int) -> list[list[int]]:
        """Distinct from their first token on, so that no cache of prefixes helps anyone."""
        tokens = np.random.default_rng(seed).integers(3, self.size.vocab, (count, self.size.prompt_tokens))
        return [[int(token) for token in row] for row in tokens]


def write_llama(size: Size, dtype: str, folder: Path) -> None:
    """Random weights as transformers initialises them; input and output embedding shared."""
    transformers.logging.disable_progress_bar()
    config = transformers.LlamaConfig(
        vocab_size=size.vocab,
        hidden_size=size.hidden,
        intermediate_size=size.feed_forward,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).save_pretrained(folder)
