"""Opening the card that `detect` found: the right torch, the right index, and what Triton adds on any vendor's card.

`detect` counts cards as the driver's own tools do; torch may count otherwise (CUDA: fastest first). A card is
therefore found again by its uuid where torch tells uuids, and by its index elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from tokenplane_core.backend.errors import BackendUnavailable
from tokenplane_core.backend.records import Device

from .choice import Unavailable
from .composed import triton_kernels
from .gpu import GpuDevice
from .sampler import FastDraw


def require_torch(backend: str, platform: str, build: str | None, api: Any) -> None:
    """Check that torch was built for a platform and can drive it.

    platform: for people, "CUDA". build: its version in torch.version. api: torch.cuda or torch.xpu.
    Raises:
        BackendUnavailable: names what is installed and what to do.
    """
    if build is None:
        raise BackendUnavailable(
            f"{backend}: torch {torch.__version__} is installed, which is not built for {platform}; uninstall it and"
            f" install the {platform} build as pytorch.org (Get Started) says for this system"
        )
    if not api.is_available():
        raise BackendUnavailable(
            f"{backend}: torch {torch.__version__} is built for {platform} {build}, but finds no device that it can"
            f" use; python -c 'import torch; {api.__name__}.init()' says what it misses"
        )


def torch_index(backend: str, device: Device, api: Any) -> int:
    """The index by which torch knows a device: that of the same uuid, or the same one where torch tells no such uuid.

    Raises:
        BackendUnavailable: torch has fewer devices.
    """
    count = int(api.device_count())
    wanted = _plain(device.uuid)
    for index in range(count):
        if wanted and wanted in _uuids(api.get_device_properties(index)):
            return index
    if device.index < count:
        return device.index
    raise BackendUnavailable(
        f"{backend}: torch finds {count} device{'' if count == 1 else 's'} and knows no device {device.index}"
        f" ({device.name}, {device.uuid or 'no uuid'})"
    )


def _uuids(properties: Any) -> set[str]:
    """What a card may be called. HIP keeps the letters of the name in the uuid's bytes, CUDA the number they spell."""
    known = _plain(str(getattr(properties, "uuid", "")))
    try:
        return {known, bytes.fromhex(known).decode("ascii").lower()}
    except ValueError:
        return {known}


def _plain(uuid: str) -> str:
    return uuid.lower().removeprefix("gpu-").replace("-", "")


@contextmanager
def only_visible(variable: str, uuid: str) -> Iterator[None]:
    """Let a driver that starts inside see one device only, without narrowing what `detect` sees later."""
    before = os.environ.get(variable)
    os.environ[variable] = uuid
    try:
        yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


class Card(GpuDevice):
    """A GPU for which Triton, where it drives it, brings a sampling kernel and fused layers."""

    def fast_draw(self) -> FastDraw | None:
        if self._triton_problem():
            return None
        from .triton.sampling import draw

        return draw

    def fuse(self, module: torch.nn.Module) -> Mapping[str, str]:
        if problem := self._triton_problem():
            return {"fusions": f"none: {problem}"}
        from .triton.fusions import fuse

        return fuse(module)

    def _triton_problem(self) -> str:
        try:
            triton_kernels(self)
        except Unavailable as reason:
            return str(reason)
        return ""
