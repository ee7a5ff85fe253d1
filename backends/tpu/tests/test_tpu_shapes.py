"""The buckets a TPU compiles, and the host device that stands in for one only when it is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tokenplane_core.backend.records import ShapePolicy
from tokenplane_tpu import host
from tokenplane_tpu.plugin import TpuBackend
from tokenplane_tpu.runtime import TABLE_ENTRIES, TpuDevice, XlaHostDevice, chip_environment


def shapes(sequences: int, step_tokens: int, max_model_tokens: int) -> ShapePolicy:
    return TpuDevice(torch.device("cpu")).shapes(sequences, step_tokens, max_model_tokens)


def test_rows_and_tokens_grow_in_powers_of_two() -> None:
    policy = shapes(64, 2048, 8192)
    assert (policy.mode, policy.pad_rows, policy.context_rule) == ("hard", False, "none")
    assert [b.rows for b in policy.buckets if b.phase == "decode"] == [8, 16, 32, 64]
    prefill = [(b.tokens, b.rows) for b in policy.buckets if b.phase == "prefill"]
    assert prefill == [(16, 16), (32, 32), (64, 64), (128, 64), (256, 64), (512, 64), (1024, 64), (2048, 64)]


@pytest.mark.parametrize(("sequences", "step_tokens"), [(1, 1), (3, 20), (100, 1000)])
def test_every_batch_within_the_wishes_has_a_bucket(sequences: int, step_tokens: int) -> None:
    """Rows of one token each are the narrowest case: as many rows as tokens."""
    policy = shapes(sequences, step_tokens, 4096)
    for rows in range(1, sequences + 1):
        assert any(b.phase == "decode" and b.rows >= rows for b in policy.buckets)
        if rows <= step_tokens:
            assert any(b.phase == "prefill" and b.rows >= rows and b.tokens >= rows for b in policy.buckets)


@pytest.mark.parametrize("max_model_tokens", [2048, 32768, 131072, 1 << 20])
def test_the_tables_of_every_bucket_fit_into_scalar_memory(max_model_tokens: int) -> None:
    blocks = -(-max_model_tokens // TpuDevice.block_tokens)
    for bucket in shapes(512, 2048, max_model_tokens).buckets:
        assert bucket.rows * blocks <= TABLE_ENTRIES


def test_the_host_has_few_shapes() -> None:
    device = XlaHostDevice(torch.device("cpu"))
    assert len(device.shapes(device.default_sequences, device.default_step_tokens, 1024).buckets) <= 6


def test_the_host_is_no_tpu_unless_it_is_asked_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PJRT_DEVICE", raising=False)
    assert all(device.arch != host.ARCH for device in TpuBackend().detect().devices)


def test_asked_for_it_is_there_but_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PJRT_DEVICE", "CPU")
    monkeypatch.setattr(host, "find_spec", lambda name: object())
    (device,) = TpuBackend().detect().devices
    assert (device.kind, device.name, device.score) == ("tpu", "XLA on the host", 0)
    assert device.notes.startswith("for tests")


def test_without_torch_xla_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(host, "find_spec", lambda name: None)
    report = host.detect_host(tmp_path)
    assert report.status == "broken" and "torch-xla is not installed" in report.reason


def test_a_users_xla_flags_are_left_alone() -> None:
    environ = {"XLA_FLAGS": "--xla_dump_to=x"}
    host.compile_fast(environ)
    assert environ == {"XLA_FLAGS": "--xla_dump_to=x"}


@pytest.mark.parametrize(
    ("visible", "index", "chip"),
    [({}, 3, "3"), ({"TPU_VISIBLE_CHIPS": "2,5"}, 1, "5"), ({"TPU_VISIBLE_DEVICES": "1, 0"}, 1, "0")],
)
def test_a_process_takes_one_chip_of_those_visible(visible: dict[str, str], index: int, chip: str) -> None:
    environment = chip_environment(index, visible)
    assert (environment["TPU_VISIBLE_CHIPS"], environment["TPU_PROCESS_BOUNDS"]) == (chip, "1,1,1")
