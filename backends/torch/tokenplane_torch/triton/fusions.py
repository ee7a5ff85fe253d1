"""Put the fused kernels into a transformers model: norms, gated MLPs and rotary embedding.

It goes by what a module consists of, not by the name of its class, and believes nothing: every replacement is
compared with what it replaces on random input, on the device, and stays only if both agree. A replaced module keeps
its parameters; only its `forward` is another.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn import functional as F

from .activation import gated
from .norm import MOST_WIDTH, rms_norm
from .rotary import rotate

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # two roundings apart
NOT_MEANT = "the model has none"  # a module that a piece is not about


def fuse(model: Module) -> Mapping[str, str]:
    """Replace what can be replaced, and say for each piece "triton" or why not. The weights are on the device."""
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    device = next(model.parameters()).device
    widths = {2 * buffer.numel() for name, buffer in model.named_buffers() if name.endswith("inv_freq")}
    proof = _Proof(dtype, device)
    return {
        "norm": _each(model, lambda part: _fuse_norm(part, proof)),
        "gated_mlp": _each(model, lambda part: _fuse_mlp(part, proof)),
        "rotary": _each(model, lambda part: _fuse_rotary(part, widths, proof)),
    }


def _each(model: Module, attempt: Callable[[Module], str | None]) -> str:
    """Try it with every module; an attempt returns None once it holds, or the reason why it does not."""
    outcomes = [attempt(part) for part in list(model.modules())]
    reasons = [reason for reason in outcomes if reason not in (None, NOT_MEANT)]
    fused = outcomes.count(None)
    if not reasons:
        return "triton" if fused else f"torch: {NOT_MEANT}"
    return f"torch: {reasons[0]}" if not fused else f"triton; {len(reasons)} by torch: {reasons[0]}"


class _Proof:
    """Random inputs, the same on every rank of a parallel group, and the comparison."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self._generator = torch.Generator().manual_seed(0)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator).to(self.device, self.dtype)

    @torch.inference_mode()
    def difference(self, original: Callable[[], Tensor], fused: Callable[[], Tensor]) -> str | None:
        """None if both give the same up to rounding, row by row."""
        try:
            want, got = original(), fused()
        except Exception as error:  # whatever a module of unknown kind may raise
            return f"it cannot be tried: {type(error).__name__}: {error}"
        if want.shape != got.shape or want.dtype != got.dtype:
            return f"it gives {got.dtype} {tuple(got.shape)}, not {want.dtype} {tuple(want.shape)}"
        want, got = want.float(), got.float()
        worst = ((want - got).abs().amax(-1) / want.abs().amax(-1).clamp(min=1e-30)).max().item()
        return None if worst <= TOLERANCE[self.dtype] else f"it differs by {worst:.1e} of the largest value"


def _takes_one_tensor(part: Any) -> bool:
    return len(inspect.signature(part.forward).parameters) == 1


def _fuse_norm(part: Any, proof: _Proof) -> str | None:
    eps = next((e for name in ("variance_epsilon", "eps") if isinstance(e := getattr(part, name, None), float)), None)
    own = [name for name, _ in part.named_parameters()]
    if eps is None or own != ["weight"] or part.weight.dim() != 1 or not _takes_one_tensor(part):
        return NOT_MEANT
    width = len(part.weight)
    if width > MOST_WIDTH:
        return f"rows of {width} elements, above {MOST_WIDTH}"
    # Rows of several sizes: in small ones eps counts.
    x = proof.random(3, width) * torch.tensor([[1.0], [1e-3], [30.0]], device=proof.device, dtype=proof.dtype)
    reason = None
    for plus_one in (False, True):

        def forward(hidden: Tensor, plus_one: bool = plus_one) -> Tensor:
            return rms_norm(hidden, part.weight, eps, plus_one)

        reason = proof.difference(lambda: part(x), lambda forward=forward: forward(x))  # type: ignore[misc]
        if reason is None:
            part.forward = forward
            return None
    return reason


def _fuse_mlp(part: Any, proof: _Proof) -> str | None:
    joint = isinstance(getattr(part, "gate_up_proj", None), Module)
    names = ("gate_up_proj", "down_proj") if joint else ("gate_proj", "up_proj", "down_proj")
    act = next((getattr(part, name) for name in ("act_fn", "activation_fn") if hasattr(part, name)), None)
    if act is None or not all(isinstance(getattr(part, name, None), Module) for name in names):
        return NOT_MEANT
    if not _takes_one_tensor(part):
        return "its MLP takes more than the hidden states"
    width = getattr(getattr(part, names[0]), "in_features", None)
    if width is None:
        return "the input width of its MLP is unknown"
    grid = torch.linspace(-8, 8, 257, device=proof.device)
    known = {"silu": F.silu(grid), "gelu_tanh": F.gelu(grid, approximate="tanh")}
    activation = next((name for name, want in known.items() if torch.allclose(act(grid), want, atol=1e-5)), None)
    if activation is None:
        return "its activation is neither silu nor gelu_tanh"

    def forward(hidden: Tensor) -> Tensor:
        gate, up = part.gate_up_proj(hidden).chunk(2, -1) if joint else (part.gate_proj(hidden), part.up_proj(hidden))
        return part.down_proj(gated(gate, up, activation))  # type: ignore[no-any-return]

    x = proof.random(1, 3, width)
    reason = proof.difference(lambda: part(x), lambda: forward(x))
    if reason is None:
        part.forward = forward
    return reason


def _fuse_rotary(part: Any, widths: set[int], proof: _Proof) -> str | None:
    """Give an attention module a forward that finds the fused function under the name of the original one.

    The module's code stays what it is; only what that name stands for changes, and for this instance alone.
    """
    forward, name = type(part).forward, "apply_rotary_pos_emb"
    if not isinstance(forward, FunctionType) or name not in forward.__code__.co_names:
        return NOT_MEANT
    head_dim, original = getattr(part, "head_dim", None), forward.__globals__[name]
    if not isinstance(head_dim, int) or not widths:
        return "its head size or its rotary frequencies are unknown"
    rotary = _rotary(original, widths)
    for width in widths:
        query, key = proof.random(1, 3, 5, head_dim), proof.random(1, 2, 5, head_dim)
        cos, sin = proof.random(1, 5, width), proof.random(1, 5, width)
        for i in (0, 1):
            reason = proof.difference(
                lambda i=i: original(query, key, cos, sin)[i],  # type: ignore[misc]  # noqa: B023
                lambda i=i: rotary(query, key, cos, sin)[i],  # type: ignore[misc]  # noqa: B023
            )
            if reason is not None:
                return reason
    names = {**forward.__globals__, name: rotary}
    same = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    same.__kwdefaults__ = forward.__kwdefaults__
    part.forward = MethodType(same, part)
    return None


def _rotary(original: Callable[..., Any], widths: set[int]) -> Callable[..., tuple[Tensor, Tensor]]:
    def rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **options: Any) -> Any:
        plain = query.dim() == 4 and len(query) == 1 and not rest and not options and cos.dtype == query.dtype
        if not plain or cos.shape[-1] not in widths or query.stride(-1) != 1 or key.stride(-1) != 1:
            return original(query, key, cos, sin, *rest, **options)
        # Into new tensors: some models use the keys as they were before (as values).
        outs = torch.empty_like(query), torch.empty_like(key)
        packed = [t[0].transpose(0, 1) for t in (query, key, *outs)]  # [t, heads, dim]
        rotate(packed[0], packed[1], cos[0], sin[0], packed[2], packed[3])
        return outs

    return rotary
