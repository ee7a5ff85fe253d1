"""The laws over padded steps: fixed shapes, programs, tokens that stay on the device."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Literal

import pytest

from tokenplane_core.backend.hookspecs import hookimpl
from tokenplane_core.backend.records import DetectReport, Device, LoadOptions
from tokenplane_core.kit.adapters import greedy_with_adapter
from tokenplane_core.kit.checkpoint import reference_greedy, write_tiny_llama
from tokenplane_core.kit.laws import LAWS, NotApplicable, Subject
from tokenplane_core.model import describe_model
from tokenplane_torch.backend import TorchBackend
from tokenplane_torch.device import TorchDevice
from tokenplane_torch.testing.device import PaddedDevice

Kind = Literal["packed", "rectangle"]


class PaddedBackend(TorchBackend):
    name, version = "padded", "0"

    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self._kind: Kind = kind

    @hookimpl
    def detect(self) -> DetectReport:
        return DetectReport("found", (Device("test", 0, "host", "any", 1 << 40, ("float32",), 0),))

    def open_device(self, device: Device, options: LoadOptions) -> TorchDevice:
        return PaddedDevice(self._kind)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny-llama")
    write_tiny_llama(path)
    return path


@pytest.mark.parametrize("kind", ["packed", "rectangle"])
@pytest.mark.parametrize("law_name", LAWS)
def test_padded_steps_keep_the_law(law_name: str, kind: Kind, folder: Path) -> None:
    model = describe_model(folder, dtype="float32")
    subject = Subject("padded", lambda: PaddedBackend(kind), model, partial(reference_greedy, folder))
    subject.adapter_reference = partial(greedy_with_adapter, folder)
    try:
        LAWS[law_name](subject)
    except NotApplicable as reason:
        pytest.skip(str(reason))
