"""Is a backend right? The kit's laws, kernels against their twins, models against transformers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from gpu.subject import SectionFailed, SectionSkipped, Subject
from tokenplane_core.backend.errors import BackendError
from tokenplane_core.backend.plugins import load_plugin
from tokenplane_core.kit.report import read_report
from tokenplane_core.kit.runner import LocalEngine
from tokenplane_core.model import describe_model
from tokenplane_torch.choice import Unavailable, audition
from tokenplane_torch.composed import LAST_CANDIDATES
from tokenplane_torch.failures import first_line
from tokenplane_torch.gpu import GpuDevice
from tokenplane_torch.kernels import LayerNeed
from tokenplane_torch.kv_cache import LayerShape
from tokenplane_torch.testing.checkpoints import FAMILIES, make_checkpoint, reference_greedy


def kit(subject: Subject) -> dict[str, object]:
    """The conformance kit, as `pytest --tokenplane-backend` runs it."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "report.json"
        command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--tokenplane-backend", subject.backend]
        done = subprocess.run(
            [sys.executable, *command, "--tokenplane-report", str(file)], cwd=folder, capture_output=True, text=True
        )
        if not file.is_file():
            raise SectionFailed("the kit did not run", {"output": done.stdout[-4000:] + done.stderr[-4000:]})
        report = read_report(file)
    outcomes = {law.law: f"{law.outcome}{': ' if law.reason else ''}{law.reason}" for law in report.laws}
    facts: dict[str, object] = {"level": report.level, "laws": outcomes, "declared": report.declared}
    broken = [law.law for law in report.laws if law.outcome == "failed"]
    if broken:
        raise SectionFailed(f"broken: {', '.join(broken)}", facts)
    return facts


def kernels(subject: Subject) -> dict[str, object]:
    """Every candidate with every kind of layer on random batches, against the torch twins."""
    device, opened = subject.open()
    candidates = opened.candidates if isinstance(opened, GpuDevice) else LAST_CANDIDATES
    facts: dict[str, object] = {}
    wrong = []
    for label, need in layer_needs(device.dtypes):
        outcomes = {}
        for candidate in candidates:
            try:
                audition(candidate.make([need], opened), need, opened)
                outcomes[candidate.name] = "right"
            except Unavailable as reason:
                outcomes[candidate.name] = str(reason)
                wrong += [f"{candidate.name} for {label}"] if "wrong on a trial batch" in str(reason) else []
            except Exception as error:  # whatever a library does
                outcomes[candidate.name] = f"{type(error).__name__}: {first_line(error)}"
        if "right" not in outcomes.values():
            wrong.append(f"nothing serves {label}")
        facts[label] = outcomes
    if wrong:
        raise SectionFailed("; ".join(wrong), facts)
    return facts


def layer_needs(dtypes: tuple[str, ...]) -> Iterator[tuple[str, LayerNeed]]:
    """Layers of well-known models, in every dtype of the device."""
    for name in dtypes:
        dtype = getattr(torch, name)
        yield f"Llama 3 8B, {name}", LayerNeed(32, LayerShape(8, 128, 128, dtype))
        yield f"Llama 3 1B, {name}", LayerNeed(32, LayerShape(8, 64, 64, dtype))
        yield f"Mistral 7B, {name}", LayerNeed(32, LayerShape(8, 128, 128, dtype), window=4096)
        yield f"Gemma 2 9B, {name}", LayerNeed(16, LayerShape(8, 256, 256, dtype), window=4096, softcap=50.0)
        yield f"gpt-oss, {name}", LayerNeed(64, LayerShape(8, 64, 64, dtype), window=128, sinks=True)
        yield f"DeepSeek V3 (MLA), {name}", LayerNeed(16, LayerShape(16, 192, 128, dtype))


def models(subject: Subject) -> dict[str, object]:
    """Greedy tokens of small random models in float32, against transformers' `generate` on the host."""
    device, _ = subject.open()
    if "float32" not in device.dtypes:
        raise SectionSkipped(f"{device.name} does not compute in float32: texts cannot be compared")
    prompts = [[1 + (7 * i + j) % 300 for j in range(length)] for i, length in enumerate((3, 17, 40, 90))]
    outcomes: dict[str, object] = {}
    for family in FAMILIES:
        with TemporaryDirectory() as folder:
            path = make_checkpoint(family, Path(folder))
            try:
                outcomes[family] = _compare(subject, path, prompts)
            except BackendError as error:
                outcomes[family] = f"refused: {error}"
    unlike = [family for family, outcome in outcomes.items() if outcome != "equal"]
    if unlike:
        raise SectionFailed(f"not equal: {', '.join(unlike)}", outcomes)
    return outcomes


def _compare(subject: Subject, path: Path, prompts: list[list[int]]) -> str:
    engine = LocalEngine(
        lambda: load_plugin(subject.backend), describe_model(path, dtype="float32"), kv_cache_tokens=4096
    )
    try:
        got = engine.generate(prompts, 12)
    finally:
        engine.close()
    wanted = [reference_greedy(path, prompt, 12) for prompt in prompts]
    unlike = sum(a != b for a, b in zip(got, wanted, strict=True))
    return f"{unlike} of {len(prompts)} texts differ" if unlike else "equal"
