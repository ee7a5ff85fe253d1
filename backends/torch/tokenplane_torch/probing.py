"""Asking a vendor's attention library whether it can serve here: is it there, new enough, made for these layers?

Only what the library itself says or demands counts. Whether it then computes right is for choice.py to try.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch

from .choice import Unavailable
from .failures import first_line
from .kernels import LayerNeed


def library(name: str) -> ModuleType:
    """Import a library or a part of it (`flashinfer.decode`).

    Raises:
        Unavailable: it is not installed, lacks that part or cannot be imported.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        top = name.partition(".")[0]
        if error.name == top:
            raise Unavailable(f"{top} is not installed") from error
        raise Unavailable(f"the installed {top} has no module {error.name}") from error
    except Exception as error:  # a binary of another torch or driver fails in any way
        raise Unavailable(f"{name} cannot be imported: {type(error).__name__}: {first_line(error)}") from error


def require_version(module: ModuleType, least: tuple[int, ...]) -> str:
    """The version of an imported library, at least `least`.

    Raises:
        Unavailable: it is older, or does not say.
    """
    version = str(getattr(module, "__version__", "unknown"))
    wanted = ".".join(map(str, least))
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[: len(least)])
    if numbers < least:
        raise Unavailable(f"version {version} is installed, {wanted} or newer is needed")
    return version


@dataclass(frozen=True, slots=True)
class Serves:
    """What kernels are made for."""

    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)
    most_dim: int = 256
    dim_multiple: int = 8
    unlike_dims: bool = False  # keys and values may differ in size
    block_multiple: int = 1
    block_sizes: tuple[int, ...] = ()  # no others; (): any multiple
    windows: bool = True
    softcap: bool = True
    sinks: bool = False

    def require(self, needs: Sequence[LayerNeed], block_tokens: int) -> None:
        """
        Raises:
            Unavailable: a layer needs something else; names it, its value and the limit.
        """
        if block_tokens % self.block_multiple:
            raise Unavailable(f"its blocks are multiples of {self.block_multiple} tokens, these have {block_tokens}")
        if self.block_sizes and block_tokens not in self.block_sizes:
            sizes = ", ".join(map(str, self.block_sizes))
            raise Unavailable(f"its blocks have {sizes} tokens, these have {block_tokens}")
        for need in dict.fromkeys(needs):
            if reason := self._lacks(need):
                raise Unavailable(reason)

    def _lacks(self, need: LayerNeed) -> str:
        shape = need.shape
        if shape.dtype not in self.dtypes:
            served = " and ".join(_name(dtype) for dtype in self.dtypes)
            return f"it computes in {served}, not in {_name(shape.dtype)}"
        for dim in (shape.key_dim, shape.value_dim):
            if dim > self.most_dim or dim % self.dim_multiple:
                return f"head size {dim}: it takes multiples of {self.dim_multiple} up to {self.most_dim}"
        if shape.key_dim != shape.value_dim and not self.unlike_dims:
            return f"keys of {shape.key_dim} and values of {shape.value_dim}: it takes one size"
        lacking = {
            "sliding windows": need.window is not None and not self.windows,
            "soft caps": need.softcap is not None and not self.softcap,
            "attention sinks": need.sinks and not self.sinks,
        }
        return next((f"it has no {what}" for what, lacks in lacking.items() if lacks), "")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
