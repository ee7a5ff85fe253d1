"""Find, ask and open backend plugins.

Listing and asking import nothing here: `detect` runs in a child process with a time limit, because a driver may
crash, hang or print. Every refusal keeps its reason.
"""

from __future__ import annotations

import difflib
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from time import perf_counter
from typing import Any, TypeVar

import msgspec
import pluggy

from .errors import BackendNotFound, BackendUnavailable, ContractViolation
from .hookspecs import REQUIRED_HOOKS, BackendHooks
from .records import (
    CONTRACT_VERSION,
    AdapterSpec,
    Capabilities,
    DecodeBatch,
    DetectReport,
    Device,
    KVLayout,
    LoadOptions,
    ModelSpec,
    PrefillBatch,
    SamplingBatch,
    StepHandle,
)

T = TypeVar("T")

GROUP = "tokenplane.backends"
OBSERVERS_GROUP = "tokenplane.observers"
ANSWER_MARK = "tokenplane-detect "


class ChildAnswer(msgspec.Struct):
    """What the detect child prints."""

    contract: str
    report: DetectReport


@dataclass(frozen=True)
class PluginAnswer:
    """One installed plugin and what its detect() said."""

    name: str
    distribution: str
    version: str
    contract: str  # "" if the plugin could not even be imported
    report: DetectReport
    elapsed_s: float


def installed() -> dict[str, EntryPoint]:
    """Entry points by backend name. Imports no plugin."""
    return {point.name: point for point in entry_points(group=GROUP)}


def _entry_point(name: str) -> EntryPoint:
    points = installed()
    if name in points:
        return points[name]
    close = difflib.get_close_matches(name, points, n=1)
    hint = f"; did you mean {close[0]}?" if close else "."
    listing = ", ".join(sorted(points)) or "none"
    raise BackendNotFound(
        f"no backend plugin is called {name!r}{hint} Installed: {listing}. Others come with"
        f' pip install "tokenplane[{name}]" or from their vendor.'
    )


def ask(name: str, timeout_s: float = 10.0) -> PluginAnswer:
    """Run one plugin's detect() in a child process.

    Raises:
        BackendNotFound: no plugin of that name is installed.
    """
    point = _entry_point(name)
    start_s = perf_counter()
    contract, report = _detect_in_child(name, timeout_s)
    return PluginAnswer(
        name=name,
        distribution=point.dist.name if point.dist else "",
        version=point.dist.version if point.dist else "",
        contract=contract,
        report=report,
        elapsed_s=perf_counter() - start_s,
    )


def survey(timeout_s: float = 10.0) -> list[PluginAnswer]:
    """Ask every installed plugin, side by side; ordered by name."""
    names = sorted(installed())
    with ThreadPoolExecutor(max_workers=8) as pool:
        return list(pool.map(lambda name: ask(name, timeout_s), names))


def _detect_in_child(name: str, timeout_s: float) -> tuple[str, DetectReport]:
    command = [sys.executable, "-m", "tokenplane_core.backend.detect_child", name]
    # A session of its own, so that whatever the driver's library started ends with it.
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as child:
        try:
            out, errors = child.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            return "", DetectReport("broken", reason=f"detect() gave no answer within {timeout_s:g} s")
    for line in out.split("\n"):
        if line.startswith(ANSWER_MARK):
            return _read_answer(line[len(ANSWER_MARK) :])
    last = (errors.strip().splitlines() or ["no message"])[-1]
    how = f"died of signal {-child.returncode}" if child.returncode < 0 else f"ended with status {child.returncode}"
    return "", DetectReport("broken", reason=f"detect() {how}: {last}")


def _read_answer(line: str) -> tuple[str, DetectReport]:
    try:
        answer = msgspec.json.decode(line, type=ChildAnswer)
    except msgspec.MsgspecError as error:
        return "", DetectReport("broken", reason=f"detect() returned a report that breaks the contract: {error}")
    report = answer.report
    if (report.status == "found") != bool(report.devices):
        why = f"detect() says {report.status} with {len(report.devices)} devices"
        return answer.contract, DetectReport("broken", reason=why)
    return answer.contract, report


class Backend:
    """An opened plugin: the hooks as typed methods.

    Calls go through pluggy, so that observer plugins (group tokenplane.observers) can wrap prefill and decode.
    """

    def __init__(self, name: str, plugin: object, observers: Iterable[object] = ()) -> None:
        """Check the plugin against the contract.

        Raises:
            ContractViolation: names the plugin, the hook and what is wrong.
        """
        self.name = name
        _check_contract_version(name, str(getattr(plugin, "contract", "")))
        manager = pluggy.PluginManager("tokenplane")
        manager.add_hookspecs(BackendHooks)
        try:
            manager.register(plugin, name)
            for observer in observers:
                manager.register(observer)
            manager.check_pending()
        except pluggy.PluginValidationError as error:
            raise ContractViolation(f"backend {name}: {error}") from error
        own = {caller.name for caller in manager.get_hookcallers(plugin) or ()}
        missing = [hook for hook in REQUIRED_HOOKS if hook not in own]
        if missing:
            raise ContractViolation(
                f"backend {name} does not implement {', '.join(missing)} (is @hookimpl on the method?)"
            )
        self.has_warmup = "warmup" in own
        self._has_adapters = {"adapter_load", "adapter_drop"} <= own
        self._has_close = "close" in own
        self._hook: Any = manager.hook

    def detect(self) -> DetectReport:
        return self._expect(self._hook.detect(), DetectReport, "detect")

    def load(self, model: ModelSpec, options: LoadOptions) -> Capabilities:
        capabilities = self._expect(self._hook.load(model=model, options=options), Capabilities, "load")
        _check_contract_version(self.name, capabilities.contract)
        if capabilities.shapes.mode == "hard" and not self.has_warmup:
            raise ContractViolation(f"backend {self.name} declares hard shapes but implements no warmup")
        self._require_offered("weights", model.quantize, "quantizes", capabilities.device)
        self._require_offered("KV cache", model.kv_dtype, "kv_dtypes", capabilities.device)
        if capabilities.max_drafts and not capabilities.mixed:
            raise ContractViolation(
                f"backend {self.name} declares max_drafts {capabilities.max_drafts} without mixed: rows with drafts"
                " travel in prefill calls"
            )
        if capabilities.max_drafts > options.max_drafts:
            raise ContractViolation(
                f"backend {self.name} declares max_drafts {capabilities.max_drafts}, but {options.max_drafts} were"
                " asked for (LoadOptions.max_drafts)"
            )
        if capabilities.adapters is not None and not self._has_adapters:
            raise ContractViolation(
                f"backend {self.name} declares adapters but does not implement adapter_load and adapter_drop"
            )
        return capabilities

    def _require_offered(self, what: str, wish: str | None, field: str, device: Device) -> None:
        if wish is not None and wish not in getattr(device.offer, field):
            raise ContractViolation(
                f"backend {self.name} loaded a model whose {what} was to become {wish}, which its device {device.name}"
                f" does not offer (Offer.{field}); it must refuse such a model"
            )

    def kv_alloc(self, layout: KVLayout) -> None:
        self._expect(self._hook.kv_alloc(layout=layout), bool, "kv_alloc")

    def prefill(self, batch: PrefillBatch, sampling: SamplingBatch) -> StepHandle:
        handle: StepHandle = self._hook.prefill(batch=batch, sampling=sampling)
        return handle

    def decode(self, batch: DecodeBatch, sampling: SamplingBatch) -> StepHandle:
        handle: StepHandle = self._hook.decode(batch=batch, sampling=sampling)
        return handle

    def warmup(self) -> int:
        return self._expect(self._hook.warmup(), int, "warmup") if self.has_warmup else 0

    def adapter_load(self, index: int, adapter: AdapterSpec) -> None:
        """Raises UnsupportedAdapter; the index is then still free."""
        self._expect(self._hook.adapter_load(index=index, adapter=adapter), bool, "adapter_load")

    def adapter_drop(self, index: int) -> None:
        self._expect(self._hook.adapter_drop(index=index), bool, "adapter_drop")

    def close(self) -> None:
        if self._has_close:
            self._hook.close()

    def _expect(self, value: Any, kind: type[T], hook: str) -> T:
        if not isinstance(value, kind):
            raise ContractViolation(
                f"backend {self.name}: {hook} returned {type(value).__name__}, the contract says {kind.__name__}"
            )
        return value


def open_backend(name: str) -> Backend:
    """Import the plugin in this process and check it.

    Raises:
        BackendNotFound: not installed.
        BackendUnavailable: its module cannot be imported; the reason names the module and the error.
        ContractViolation: it does not keep the contract.
    """
    plugin = load_plugin(name)
    observers = [point.load()() for point in entry_points(group=OBSERVERS_GROUP)]
    return Backend(name, plugin, observers)


def load_plugin(name: str) -> object:
    """Make a plugin's object. Raises BackendNotFound and BackendUnavailable."""
    point = _entry_point(name)
    try:
        return point.load()()
    except Exception as error:
        raise BackendUnavailable(
            f"the plugin {point.value} cannot be imported: {type(error).__name__}: {error}"
        ) from error


def _check_contract_version(name: str, version: str) -> None:
    """Same major, and no newer minor: minor versions only add, so this core serves whatever was written before it."""
    theirs, ours = _numbers(version), _numbers(CONTRACT_VERSION)
    if theirs is None or ours is None or theirs[0] != ours[0] or theirs > ours:
        raise ContractViolation(
            f"backend {name} was written for contract {version or 'of no version'}, this core speaks"
            f" {CONTRACT_VERSION}; install matching releases"
        )


def _numbers(version: str) -> tuple[int, int] | None:
    major, _, minor = version.partition(".")
    return (int(major), int(minor)) if major.isdecimal() and minor.isdecimal() else None
