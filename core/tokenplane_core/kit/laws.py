"""LAWS: every law a backend keeps, by name. Here are those of being found and telling the truth."""

from __future__ import annotations

import subprocess
import sys
from time import perf_counter

from ..backend.plugins import Backend, installed
from ..backend.records import SAMPLING_FEATURES, Capabilities
from . import adapter_laws, mask_laws, prompt_laws, sampling_laws, speculation_laws, text_laws
from .subject import LAWS, Law, NotApplicable, Subject, law

__all__ = [
    "LAWS",
    "Law",
    "NotApplicable",
    "Subject",
    "adapter_laws",
    "mask_laws",
    "prompt_laws",
    "sampling_laws",
    "speculation_laws",
    "text_laws",
]

VENDOR_LIBRARIES = ("torch", "transformers", "jax", "torch_xla", "habana_frameworks", "optimum", "triton")


@law
def detect_is_quick_and_clear(subject: Subject) -> None:
    """detect() answers within two seconds, with devices or with a reason."""
    start_s = perf_counter()
    report = Backend(subject.name, subject.make_plugin()).detect()
    elapsed_s = perf_counter() - start_s
    assert elapsed_s < 2, f"detect() took {elapsed_s:.1f} s"
    assert (report.status == "found") == bool(report.devices), (
        f"status {report.status} with {len(report.devices)} devices"
    )
    assert report.devices or report.reason, f"status {report.status} without a reason"


@law
def import_is_clean(subject: Subject) -> None:
    """Importing the plugin and making its object loads no vendor library."""
    point = installed().get(subject.name)
    if point is None:
        raise NotApplicable("the plugin is not installed as an entry point")
    code = (
        f"import sys, {point.module} as m; m.{point.attr}();"
        f"print([name for name in {VENDOR_LIBRARIES!r} if name in sys.modules])"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert child.returncode == 0, child.stderr
    assert child.stdout.strip() == "[]", f"importing {point.value} loads {child.stdout.strip()}"


@law
def capabilities_are_honest(subject: Subject) -> None:
    """What load() declares is consistent, and the declared extremes really run."""
    engine = subject.engine()
    caps = engine.capabilities
    _consistent(caps)
    _names_itself(subject, caps)
    vocab, longest = subject.model.vocab_size, caps.limits.max_model_tokens
    full = engine.generate(subject.prompts(engine.engine.layout.num_slots, longest=8), 4)
    assert all(len(text) == 4 for text in full), "a batch of max_sequences rows lost tokens"
    capacity = min(longest, engine.engine.pool.num_total * engine.engine.layout.block_tokens)
    text = engine.generate([[i % vocab for i in range(capacity - 2)]], 2)[0]
    assert len(text) == 2, "a sequence of max_model_tokens lost tokens"
    assert all(0 <= token < vocab for token in sum(full, text)), "a token outside the vocabulary"
    engine.close()


def _consistent(caps: Capabilities) -> None:
    limits, shapes = caps.limits, caps.shapes
    assert caps.sampling.features <= SAMPLING_FEATURES, (
        f"unknown sampling features {caps.sampling.features - SAMPLING_FEATURES}"
    )
    for name in ("max_sequences", "max_step_tokens", "max_model_tokens", "max_prefill_rows"):
        assert getattr(limits, name) >= 1, f"limits.{name} is {getattr(limits, name)}"
    assert caps.kv.block_bytes > 0 and caps.kv.budget_bytes >= 0, "the KV cache has no size"
    if caps.kv.kind == "slot":
        assert caps.kv.block_tokens == limits.max_model_tokens, "a slot's line must hold max_model_tokens"
    if shapes.mode == "hard":
        rows = max((b.rows for b in shapes.buckets if b.phase == "decode"), default=0)
        assert rows >= limits.max_sequences, f"max_sequences is {limits.max_sequences}, the widest decode bucket {rows}"


def _names_itself(subject: Subject, caps: Capabilities) -> None:
    contract = getattr(subject.make_plugin(), "contract", "")
    assert caps.contract == contract, f"the class declares contract {contract}, load() says {caps.contract}"
    assert caps.dtype in caps.device.dtypes, f"computes in {caps.dtype}, the device in {', '.join(caps.device.dtypes)}"
    point = installed().get(subject.name)
    if point is not None:
        assert caps.backend == subject.name, f"installed as {subject.name}, load() says {caps.backend}"
        version = point.dist.version if point.dist else caps.version
        assert caps.version == version, f"version {version} is installed, load() says {caps.version}"
