"""Opening a card: which torch, which index, and what the process may see meanwhile."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from tokenplane_core.backend.errors import BackendUnavailable
from tokenplane_core.backend.records import Device
from tokenplane_torch.cards import Card, only_visible, require_torch, torch_index
from tokenplane_torch.testing.checkpoints import make_checkpoint
from tokenplane_torch.testing.graphs import HostGpuDevice

FIRST, SECOND = "8e59a2b4-0000-1111-2222-0123456789ab", "11112222-3333-4444-5555-666677778888"


def api(*uuids: str | None, available: bool = True) -> Any:
    """torch.cuda with these cards; None: a torch that tells no uuid."""
    cards = [SimpleNamespace() if uuid is None else SimpleNamespace(uuid=uuid) for uuid in uuids]
    return SimpleNamespace(
        __name__="torch.cuda",
        is_available=lambda: available,
        device_count=lambda: len(cards),
        get_device_properties=cards.__getitem__,
    )


def card(index: int, uuid: str = "") -> Device:
    return Device("cuda", index, "GPU of a test", "sm_90", 1 << 30, ("bfloat16",), 100, uuid=uuid)


def test_a_card_is_found_by_its_uuid_where_torch_counts_otherwise() -> None:
    assert torch_index("cuda", card(0, f"GPU-{SECOND}"), api(FIRST, SECOND)) == 1
    assert torch_index("cuda", card(1, f"GPU-{FIRST}"), api(FIRST, SECOND)) == 0


def test_hips_uuids_hold_the_letters_of_the_name() -> None:
    spelt = "9f3c00112233aabb"
    assert torch_index("rocm", card(0, f"GPU-{spelt}"), api(FIRST, spelt.encode().hex())) == 1


def test_without_a_common_uuid_the_index_counts() -> None:
    assert torch_index("xpu", card(1, "0000:4d:00.0"), api(FIRST, SECOND)) == 1
    assert torch_index("xpu", card(1), api(None, None)) == 1


def test_a_card_that_torch_does_not_have_is_refused() -> None:
    with pytest.raises(BackendUnavailable, match=r"finds 1 device and knows no device 1 \(GPU of a test, no uuid\)"):
        torch_index("cuda", card(1), api(FIRST))


def test_torch_must_be_built_for_the_platform_and_find_a_device() -> None:
    require_torch("cuda", "CUDA", "12.8", api(FIRST))
    with pytest.raises(BackendUnavailable, match=rf"torch {re.escape(torch.__version__)}.*not built for CUDA"):
        require_torch("cuda", "CUDA", None, api(FIRST))
    with pytest.raises(BackendUnavailable, match=r"built for CUDA 12\.8, but finds no device .* torch\.cuda\.init\(\)"):
        require_torch("cuda", "CUDA", "12.8", api(available=False))


@pytest.mark.parametrize("before", [None, "0,1"])
def test_a_narrowed_view_ends_with_the_block(before: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOME_VISIBLE_DEVICES", raising=False)
    if before is not None:
        monkeypatch.setenv("SOME_VISIBLE_DEVICES", before)
    with pytest.raises(RuntimeError, match="driver"), only_visible("SOME_VISIBLE_DEVICES", "MIG-1"):
        assert os.environ["SOME_VISIBLE_DEVICES"] == "MIG-1"
        raise RuntimeError("driver")
    assert os.environ.get("SOME_VISIBLE_DEVICES") == before


# --- What Triton adds ---------------------------------------------------------------------------------------


class HostCard(HostGpuDevice, Card):
    """A card that is the host."""


def test_where_triton_drives_the_card_it_samples_and_fuses(tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(make_checkpoint("llama", tmp_path))
    fused = HostCard().fuse(model)
    assert HostCard().fast_draw() is not None
    assert set(fused.values()) == {"triton"}, fused


def test_where_it_does_not_the_model_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    module = torch.nn.Linear(2, 2)
    assert HostCard().fast_draw() is None
    assert HostCard().fuse(module) == {"fusions": "none: triton is not installed"}
