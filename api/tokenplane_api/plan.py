"""`tokenplane plan`: where the memory of a device would go, printed without the device and without the weights."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from tokenplane_core.backend.choice import choose, choose_device
from tokenplane_core.backend.errors import ConfigError
from tokenplane_core.backend.plugins import installed
from tokenplane_core.backend.records import Device, LoadOptions, ModelSpec
from tokenplane_core.memory import SIMULATED, MemoryPlan, format_bytes, format_table, shard_problem, share_of
from tokenplane_core.model import describe_model
from tokenplane_core.weight_files import Weights, count_weights, read_weights, weight_files

from .accelerators import by_memory, imagined_device
from .hub import model_sha, remote_tensors, resolve_model
from .quantization import kv_dtype_of, quantize_at_load


@dataclass(frozen=True, slots=True)
class PlanReport:
    """The plan for one device; with a count also for the model split over all of them, which is not served yet."""

    plan: MemoryPlan
    count: int

    @property
    def problem(self) -> str | None:
        """Why it cannot be served there, apart from memory."""
        dtype, device = self.plan.model.dtype, self.plan.device
        if dtype not in device.dtypes:
            return f"{device.name} does not compute in {dtype}; choose --dtype {device.dtypes[0]}"
        return None

    @property
    def fits(self) -> bool:
        return self.plan.fits and self.problem is None

    @property
    def verdict(self) -> str:
        return ". ".join(part for part in (self.problem, f"It {verdict(self.plan)}") if part)

    def text(self) -> str:
        plan, device, count = self.plan, self.plan.device, self.count
        notes = f" ({device.notes})" if device.notes else ""
        free = format_bytes(plan.free_bytes)
        lines = [f"{plan.model.model_id} as {plan.model.dtype} on {device.name}{notes}, {free} free", ""]
        lines += [*format_table(plan.rows()), "", self.verdict]
        if not plan.fits:
            lines += self._elsewhere()
        if count > 1:
            replicas = "has room on each of them" if plan.fits else "has no room on any of them"
            lines += [f"{count} x {device.name}: a server of its own (a replica) {replicas}.", "", *self._split_lines()]
        return "\n".join(part for line in lines for part in textwrap.wrap(line, 100, break_on_hyphens=False) or [""])

    def _elsewhere(self) -> list[str]:
        plan, lines = self.plan, []
        if plan.longest_tokens:
            lines.append("Without --max-total-tokens, serve takes the longest sequence that fits.")
        if enough := next((name for name, device in by_memory() if replace(plan, device=device).fits), None):
            lines.append(f"The smallest device of the catalogue with room for it is {enough}.")
        return lines

    def _split_lines(self) -> list[str]:
        title = f"Tensor parallelism over {self.count} devices is not served yet."
        if problem := shard_problem(self.plan.model, self.count):
            return [f"{title} It could not be split that way: {problem}."]
        split = self._split()
        title += " By arithmetic, on each:"
        return [title, "", *format_table(split.rows()), "", f"So split it {verdict(split)}"]

    def _split(self) -> MemoryPlan:
        return replace(self.plan, shards=self.count)

    def json(self) -> str:
        plan = self.plan
        report = {
            "model_id": plan.model.model_id,
            "dtype": plan.model.dtype,
            "device": plan.device,
            "count": self.count,
            "fits": self.fits,
            "verdict": self.verdict,
            **_numbers(plan),
            "tensor_parallel": self._split_numbers() if self.count > 1 else None,
        }
        return msgspec.json.format(msgspec.json.encode(report), indent=2).decode()

    def _split_numbers(self) -> dict[str, Any]:
        problem, split = shard_problem(self.plan.model, self.count), self._split()
        common = {"is_served": False, "problem": problem, "fits": problem is None and split.fits}
        return common if problem else common | _numbers(split)


def make_plan(
    model_id: str,
    device_name: str | None,
    count: int,
    *,
    revision: str | None,
    hub_cache: Path | None,
    dtype: str | None,
    quantize: str | None = None,
    kv_cache_dtype: str | None = None,
    max_model_tokens: int | None,
    cache_tokens: int | None = None,
    memory_fraction: float = 1.0,
    options: LoadOptions,
    progress: Callable[[str], None],
) -> PlanReport:
    """Plan a model on a device by name (None: the best of this machine).

    Changes:
        A model on the hub gets its small files, no weights, into the hub cache.
    Raises:
        TokenplaneError: there is no such model, or no such device; the message is for the user.
    """
    device = share_of(find_device(device_name), memory_fraction)
    folder = resolve_model(model_id, revision, cache_dir=hub_cache, needs_weights=False, progress=progress)
    model = describe_model(folder, model_id, revision, dtype, max_model_tokens)
    model = replace(
        model,
        quantize=quantize_at_load(quantize, model.config, device.kind, device.offer.quantizes),
        kv_dtype=kv_dtype_of(kv_cache_dtype, device.kind, device.offer.kv_dtypes),
    )
    is_local = Path(model_id).expanduser().exists()
    weights = Weights(0, 0, "") if device.kind == SIMULATED else _weights(model, is_local, hub_cache)
    required_tokens = cache_tokens or model.max_model_tokens
    return PlanReport(MemoryPlan(model, weights, device, options, required_tokens, cache_tokens), count)


def find_device(name: str | None) -> Device:
    """A device of this machine for None or a backend's name, else one from the catalogue or of a size.

    Raises:
        TokenplaneError: as `choose` and `imagined_device`.
    """
    if name is not None and name not in installed():
        return imagined_device(name)
    device, _ = choose_device(choose(name))
    if not (device.memory_free_bytes or device.memory_total_bytes):
        raise ConfigError(f"{device.name} does not say how much memory it has; give a size, such as --device 80GiB")
    return device


def verdict(plan: MemoryPlan) -> str:
    """What "it" does: fit, or not, and then what to change to which value."""
    length, capacity = plan.model.max_model_tokens, plan.cache_capacity_tokens
    if plan.fits:
        return f"fits: room for {capacity:,} KV tokens, {capacity / length:,.1f} sequences of {length:,} tokens."
    needed = plan.fixed_bytes + plan.required_tokens * plan.kv.num_bytes
    what = (
        f"one sequence of {length:,}" if plan.cache_tokens_wish is None else f"a KV cache of {plan.required_tokens:,}"
    )
    return (
        f"does not fit: {what} tokens needs {format_bytes(needed)} in all,"
        f" {format_bytes(plan.free_bytes)} are free. It fits with {plan.way_out()}."
    )


def _weights(model: ModelSpec, is_local: bool, hub_cache: Path | None) -> Weights:
    """From files that are here; for a model on the hub else from their headers there; else from the index."""
    folder = Path(model.path)
    files = weight_files(folder)
    if is_local or (files and all(file.exists() for file in files)):
        return read_weights(model)
    try:
        tensors = remote_tensors(model.model_id, model_sha(folder) or model.revision, cache_dir=hub_cache)
    except ConfigError as error:
        try:
            return read_weights(model)
        except ConfigError:
            raise error from None
    return count_weights(tensors, model, "the headers of the weight files on the hub")


def _numbers(plan: MemoryPlan) -> dict[str, Any]:
    return {
        "max_model_tokens": plan.model.max_model_tokens,
        "free_bytes": plan.free_bytes,
        "cache_capacity_tokens": plan.cache_capacity_tokens,
        "cache_tokens": plan.cache_tokens,
        "rows": plan.rows(),
    }
