"""What a law is, and what it is about: a backend under test and an engine over it.

A law is a function of a `Subject`. It raises AssertionError when broken, and NotApplicable when the backend declares
that it cannot do what the law is about.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..backend.records import Capabilities, ModelSpec
from ..messages import SamplingParams
from .runner import LocalEngine


class NotApplicable(Exception):
    """The backend does not claim what this law is about; the message says which claim is missing."""


@dataclass
class Subject:
    """A backend under test: how to make its plugin object, and the model it runs."""

    name: str
    make_plugin: Callable[[], object]
    model: ModelSpec
    reference: Callable[[list[int], int], list[int]] | None = None  # prompt, tokens -> the greedy text it must give
    logprobs_reference: Callable[[list[int]], list[float]] | None = None  # of every prompt token but the first
    adapter_reference: Callable[[Path, list[int], int], list[int]] | None = None  # as reference, with that adapter
    device_index: int = 0
    declared: Capabilities | None = None  # what load() last returned

    def engine(self, **options: Any) -> LocalEngine:
        """A freshly loaded engine; options as LocalEngine's."""
        engine = LocalEngine(self.make_plugin, self.model, self.name, device_index=self.device_index, **options)
        self.declared = engine.declared
        return engine

    def prompts(self, count: int, seed: int = 0, longest: int = 96) -> list[list[int]]:
        """Random prompts of mixed length; the first has a single token."""
        rng = random.Random(f"{self.name} {seed}")
        longest = min(longest, self.model.max_model_tokens // 3)
        lengths = [1] + [rng.randint(1, longest) for _ in range(count - 1)]
        return [[rng.randrange(self.model.vocab_size) for _ in range(length)] for length in lengths]


Law = Callable[[Subject], None]
LAWS: dict[str, Law] = {}


def law(function: Law) -> Law:
    """Add a function to LAWS under its name."""
    LAWS[function.__name__] = function
    return function


def singly(
    subject: Subject, prompts: list[list[int]], num_tokens: int, sampling: SamplingParams | None = None
) -> list[list[int]]:
    """Each prompt alone, in an engine without prefix cache: the plainest circumstances."""
    engine = subject.engine(prefix_cache=False, async_depth=0)
    texts = [engine.generate([prompt], num_tokens, sampling)[0] for prompt in prompts]
    engine.close()
    return texts


def same(got: list[list[int]], expected: list[list[int]], circumstance: str) -> None:
    for i, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        if ours != theirs:
            pairs = enumerate(zip(ours, theirs, strict=False))
            at = next((k for k, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
            raise AssertionError(
                f"{circumstance}: prompt {i} differs from token {at} on:"
                f" {ours[at : at + 8]} instead of {theirs[at : at + 8]}"
            )
