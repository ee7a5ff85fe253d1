"""A stand-in for Intel's bridge: the calls of habana_frameworks.torch that bridge.py makes, over CPU tensors.

It keeps the bridge's manners (gaudi-pytorch-bridge 1.19.0 and its documentation) and refuses what a card would:

* An HPU graph is a tape of the operations that ran while it was captured; a replay runs the tape, not the program. A
  value taken from the host, a Python branch, an address that changed: all stay as they were at capture.
* While capturing: no operation that waits for a value or whose shape depends on one, no update in place of a view of
  an outside tensor, no float64, no capture within a capture.
* After warm-up no graph is captured; and what is computed lazily between two launches counts as a compiled recipe,
  so that one that was not seen in warm-up shows (`late_recipes`).
* FusedSDPA takes only the combinations the bridge asserts, and returns NaN where the vendor promises nothing.
* A copy to the host is late: an event must be waited for before its time may be asked for.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tokenplane_core.backend.hookspecs import hookimpl
from tokenplane_core.backend.records import Capabilities, DetectReport, Device, LoadOptions, ModelSpec
from tokenplane_gaudi import bridge
from tokenplane_gaudi.bridge import Bridge
from tokenplane_gaudi.card import GaudiCard
from tokenplane_gaudi.plugin import GaudiBackend
from tokenplane_torch.device import TorchDevice
from tokenplane_torch.testing.graphs import tensors_in

GIB = 1 << 30
CARD = Device("gaudi", 0, "Intel Gaudi 2", "gaudi2", 96 * GIB, ("bfloat16", "float32"), 100, uuid="3")

# Operations that wait for a value, or whose shape depends on one.
WAITING = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "bincount"}


class Refused(RuntimeError):
    """What the bridge or the card would not do."""


# --- Graphs -------------------------------------------------------------------------------------------------


@dataclass
class Operation:
    run: Any
    args: Any
    kwargs: Any
    results: list[Tensor]

    def replay(self) -> None:
        fresh = tensors_in(self.run(*self.args, **self.kwargs))
        for old, new in zip(self.results, fresh, strict=True):
            if _memory(old) != _memory(new):
                old.copy_(new)


class Tape(TorchDispatchMode):
    """Records operations, and refuses those that a graph cannot hold."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self._inside: set[int] = set()  # memory that came into being on the tape
        self._views: dict[int, Tensor] = {}  # of outside memory, taken on the tape

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket._qualified_op_name.removeprefix("aten::")
        given = tensors_in([*args, *kwargs.values()])
        by_mask = name in ("index", "index_put", "index_put_") and any(t.dtype == torch.bool for t in given[1:3])
        if name in WAITING or by_mask:
            raise Refused(f"{name} is not supported during HPU Graph capturing")
        for argument, value in zip(func._schema.arguments, args, strict=False):
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and id(value) in self._views:
                raise Refused(f"{name} updates a view in place, which HPU graphs do not capture")
        out = func(*args, **kwargs)
        results = tensors_in(out)
        sources = {_memory(tensor) for tensor in given}
        for result in results:
            if result.dtype == torch.float64:
                raise Refused(f"{name} computes in float64, which the card does not have")
            if _memory(result) not in sources:
                self._inside.add(_memory(result))
            elif all(result is not tensor for tensor in given) and _memory(result) not in self._inside:
                self._views[id(result)] = result
        self.operations.append(Operation(func, args, kwargs, results))
        return out


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class HPUGraph:
    def __init__(self, runtime: Runtime) -> None:
        self._runtime, self._tape, self._quiet = runtime, Tape(), ExitStack()

    def capture_begin(self, dry_run: bool = False) -> None:
        if self._runtime.serving:
            raise Refused("a graph is captured after warm-up")
        if self._runtime.capturing:
            raise Refused("graph Capture already in progress")
        self._runtime.flush()
        self._runtime.capturing = True
        self._quiet.enter_context(self._runtime.lazy.paused())
        self._quiet.enter_context(self._tape)

    def capture_end(self) -> None:
        self._quiet.close()
        self._runtime.capturing = False

    def replay(self, asynchronous: bool = False) -> None:
        self._runtime.not_capturing("replay")
        self._runtime.flush()
        self._runtime.replays += 1
        with self._runtime.lazy.paused():
            for operation in self._tape.operations:
                operation.replay()


ON_THE_HOST = {"lift_fresh", "detach", "resolve_conj", "resolve_neg"}  # on the way from and to numpy


class Recipes(TorchDispatchMode):
    """What is computed outside of graphs, from one launch to the next: the card compiles each such piece once."""

    def __init__(self) -> None:
        super().__init__()
        self.piece: list[str] = []
        self._paused = 0

    @contextmanager
    def paused(self) -> Iterator[None]:
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.overloadpacket._qualified_op_name.removeprefix("aten::")
        given = tensors_in([*args, *kwargs.values()])
        nothing_to_do = name == "to" and out is given[0]
        if not self._paused and name not in ON_THE_HOST and not nothing_to_do:
            self.piece.append(f"{name} {[(tuple(t.shape), t.dtype) for t in given]}")
        return out


# --- Streams and events -------------------------------------------------------------------------------------


class Stream:
    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def wait_stream(self, stream: Stream) -> None:
        self._runtime.not_capturing("wait_stream")


class Event:
    def __init__(self, runtime: Runtime, enable_timing: bool = False) -> None:
        self._runtime, self._timed = runtime, enable_timing
        self._at: int | None = None
        self._asked = self._waited = False

    def record(self) -> None:
        self._runtime.not_capturing("an event")
        self._runtime.clock += 1
        self._at = self._runtime.clock

    def query(self) -> bool:
        """The work is never done at once."""
        assert self._at is not None, "never recorded"
        self._waited, self._asked = self._waited or self._asked, True
        return self._waited

    def synchronize(self) -> None:
        assert self._at is not None, "never recorded"
        self._waited = True

    def elapsed_time(self, end: Event) -> float:
        assert self._timed and end._timed and self._at is not None and end._at is not None
        if not end._waited:
            raise Refused("elapsed_time before the event was waited for")
        return float(end._at - self._at)


# --- The modules --------------------------------------------------------------------------------------------


@dataclass
class Runtime:
    """The state behind the modules."""

    free_bytes: int = 90 * GIB
    serving: bool = False
    capturing: bool = False
    clock: int = 0
    replays: int = 0
    peak_bytes: int = 5 * GIB
    sdpa_calls: list[str] = field(default_factory=list)  # "causal" or "mask", as programs ran or were captured
    late_recipes: list[str] = field(default_factory=list)
    lazy: Recipes = field(default_factory=Recipes)
    _known: set[str] = field(default_factory=set)
    _stream: Stream | None = None

    def not_capturing(self, what: str) -> None:
        if self.capturing:
            raise Refused(f"{what} is not supported during HPU Graph capturing")

    def flush(self) -> None:
        """Launch what was accumulated."""
        piece = "; ".join(self.lazy.piece)
        self.lazy.piece.clear()
        if piece and piece not in self._known:
            self._known.add(piece)
            if self.serving:
                self.late_recipes.append(piece)

    def modules(self) -> dict[str, types.ModuleType]:
        """What sys.modules holds once the bridge is imported."""

        def module(name: str, **content: Any) -> types.ModuleType:
            made = types.ModuleType(name)
            vars(made).update(content)
            return made

        default = Stream(self)

        @contextmanager
        def stream(which: Stream) -> Iterator[None]:
            before, self._stream = self._stream, which
            yield
            self._stream = before

        def waiting(name: str, answer: Any = None) -> Callable[[], Any]:
            def call() -> Any:
                self.not_capturing(name)
                self.flush()
                return answer() if callable(answer) else answer

            return call

        def reset_peak() -> None:
            self.peak_bytes = GIB

        root = "habana_frameworks.torch"
        hpu = module(
            f"{root}.hpu",
            HPUGraph=lambda: HPUGraph(self),
            Stream=lambda: Stream(self),
            Event=lambda enable_timing=False: Event(self, enable_timing),
            stream=stream,
            default_stream=lambda: default,
            current_stream=lambda: self._stream or default,
            synchronize=waiting("synchronize"),
            mem_get_info=lambda: (self.free_bytes, 96 * GIB),
            memory_allocated=lambda: GIB,
            max_memory_allocated=lambda: self.peak_bytes,
            reset_peak_memory_stats=reset_peak,
        )
        core = module(f"{root}.core", mark_step=waiting("mark_step"))
        kernels = module(f"{root}.hpex.kernels", FusedSDPA=_fused_sdpa(self))
        hpex = module(f"{root}.hpex", kernels=kernels)
        torch_module = module(root, hpu=hpu, core=core, hpex=hpex)
        made = {m.__name__: m for m in (torch_module, hpu, core, hpex, kernels)}
        return {"habana_frameworks": module("habana_frameworks", torch=torch_module), **made}


def _fused_sdpa(runtime: Runtime) -> type:
    class FusedSDPA:
        @staticmethod
        def apply(
            q: Tensor,
            k: Tensor,
            v: Tensor,
            attn_mask: Tensor | None = None,
            dropout_p: float = 0.0,
            is_causal: bool = False,
            scale: float | None = None,
            softmax_mode: str = "None",
            recompute_mode: bool | None = None,
            valid_seq_len: Tensor | None = None,
            seq_padding_type: str = "left",
            return_dropout_mask: bool = False,
            return_attn_probs: bool = False,
        ) -> Tensor:
            runtime.sdpa_calls.append("mask" if attn_mask is not None else "causal")
            _require_sdpa(q, k, v, attn_mask, is_causal, valid_seq_len)
            if dropout_p or softmax_mode not in ("None", "fast") or return_dropout_mask or return_attn_probs:
                raise Refused("FusedSDPA: not a mode for serving")
            if valid_seq_len is not None and seq_padding_type != "right":
                raise Refused(f"FusedSDPA: padding on the {seq_padding_type}")
            return _sdpa(q, k, v, attn_mask, scale or q.shape[-1] ** -0.5, valid_seq_len)

    return FusedSDPA


def _require_sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, valid_seq_len: Tensor | None
) -> None:
    if q.dtype not in (torch.bfloat16, torch.float32) or not q.dtype == k.dtype == v.dtype:
        raise Refused(f"FusedSDPA: dtypes {q.dtype}, {k.dtype}, {v.dtype}")
    (n, heads, w, dim), (kn, kv_heads, length, kdim) = q.shape, k.shape
    if (n, dim) != (kn, kdim) or k.shape != v.shape or heads % kv_heads:
        raise Refused(f"FusedSDPA: shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}")
    if valid_seq_len is not None:
        if not is_causal or mask is not None:
            raise Refused("Valid sequence length is supported only in inference with is_causal(triangular) mask case")
        if valid_seq_len.dtype != torch.int32 or valid_seq_len.shape != (n,):
            raise Refused(f"FusedSDPA: valid_seq_len is {valid_seq_len.dtype} {tuple(valid_seq_len.shape)}")
    if is_causal and (mask is not None or w != length):
        raise Refused("FusedSDPA: causal is for a square without a mask")
    if mask is not None and (mask.dtype != q.dtype or mask.shape != (n, 1, w, length)):
        raise Refused(f"FusedSDPA: mask is {mask.dtype} {tuple(mask.shape)}")
    if mask is None and not is_causal:
        raise Refused("FusedSDPA: neither causal nor a mask")


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, valid: Tensor | None) -> Tensor:
    w, length = q.shape[2], k.shape[2]
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = torch.matmul(q, k.transpose(2, 3)).float() * scale
    if mask is None:
        at = torch.arange(length)
        scores = scores.masked_fill(at > torch.arange(w)[:, None], -torch.inf)
    else:
        scores = scores + mask.float()
    out = torch.matmul(torch.softmax(scores, -1).to(v.dtype), v)
    if valid is None:
        return out
    behind = torch.arange(w) >= valid[:, None]
    return torch.where(behind[:, None, :, None], torch.nan, out)


# --- The plugin over it -------------------------------------------------------------------------------------


class StandInCard(GaudiCard):
    """With smaller steps, so that tests capture fewer and narrower shapes: a tape costs what its shape asks for."""

    default_sequences = 16
    default_step_tokens = 512


class StandInBackend(GaudiBackend):
    """The plugin with a card that is always found, and a bridge that answers from `runtime`."""

    def __init__(self, runtime: Runtime | None = None) -> None:
        super().__init__()
        self.runtime = runtime or Runtime()
        self.environ: dict[str, str] = {}

    @hookimpl
    def detect(self) -> DetectReport:
        return DetectReport("found", (CARD,))

    def open_device(self, device: Device, options: LoadOptions) -> TorchDevice:
        with pytest.MonkeyPatch.context() as patch:
            return StandInCard(open_bridge(patch, self.runtime, self.environ, device.uuid))

    @hookimpl
    def load(self, model: ModelSpec, options: LoadOptions) -> Capabilities:
        self.runtime.serving = False
        return super().load(model, options)

    @hookimpl
    def warmup(self) -> int:
        captured = super().warmup()
        self.runtime.flush()
        self.runtime.serving = True
        return captured


def open_bridge(patch: pytest.MonkeyPatch, runtime: Runtime, environ: dict[str, str], module: str = "") -> Bridge:
    """The real bridge.py, importing the stand-in's modules, whose device is the host."""
    for name, made in runtime.modules().items():
        patch.setitem(sys.modules, name, made)
    patch.setattr(bridge, "DEVICE", "cpu")
    return Bridge(module, environ)
