"""The native linear layers equal a plain torch twin in every tier, and a row's result does not depend on the others."""

from __future__ import annotations

import errno
import mmap
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from tokenplane_core.backend.errors import ConfigError
from tokenplane_cpu import native
from tokenplane_cpu.linear import PackedLinear, Part
from tokenplane_cpu.memory import zeroed_memory
from tokenplane_cpu.native import isa, library, runnable_tiers, use_threads
from tokenplane_cpu.quantization import Form, stored
from tokenplane_cpu.structs import Activation, Epilogue, WeightType

LIBRARY = library()
RUNNABLE = runnable_tiers()
KINDS = [
    (WeightType.F32, 0),
    (WeightType.BF16, 0),
    (WeightType.INT8, 0),
    (WeightType.INT8, 128),
    (WeightType.INT4, 0),
    (WeightType.INT4, 32),
    (WeightType.INT4, 128),
]
SHAPES = [(64, 96), (50, 33), (33, 7), (576, 40), (1120, 65)]  # inputs, outputs; the last fills several chunks
ROWS = 101  # one more than a panel and a piece of a group
COUNTS = (1, 2, 3, 4, 5, 7, 8, 11, 12, 13, 17, 33, 97)
ACTIVATIONS = {
    Activation.SILU: silu,
    Activation.GELU: gelu,
    Activation.GELU_TANH: lambda x: gelu(x, approximate="tanh"),
}

pytestmark = pytest.mark.skipif(LIBRARY is None, reason="tokenplane-cpu was installed without its native kernels")


def test_looking_for_the_tiers_leaves_the_one_in_use() -> None:
    assert LIBRARY is not None
    before = LIBRARY.tp_isa()
    try:
        assert LIBRARY.tp_set_isa(b"generic") == 0
        assert runnable_tiers() == RUNNABLE and "generic" in RUNNABLE
        assert isa() == "generic"
    finally:
        LIBRARY.tp_set_isa(before)


def test_a_kernel_without_huge_pages_gives_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    class Plain(mmap.mmap):
        def madvise(self, *_: int) -> None:
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Plain)
    assert bytes(zeroed_memory(100)) == bytes(100)


@pytest.mark.parametrize(("file", "number"), [(Path(torch._C.__file__), native.ABI), (native._FILE, native.ABI + 1)])
def test_a_library_of_another_version_is_refused(file: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One without a number, and one with another."""
    monkeypatch.setattr(native, "_FILE", file)
    monkeypatch.setattr(native, "ABI", number)
    with pytest.raises(ConfigError, match=f"needs version {number}; reinstall tokenplane-cpu"):
        native.library.__wrapped__()


def close(got: Tensor, want: Tensor, tier: str, group: int) -> bool:
    """Tiles take weights with groups scaled and rounded to bf16 once more."""
    limit = 3e-3 if group and tier.startswith("amx") else 2e-6
    return bool((got.double() - want).norm() <= limit * want.norm())


def rows_of(packed: PackedLinear, count: int = ROWS) -> Tensor:
    return torch.randn(count, packed.inputs, generator=torch.Generator().manual_seed(1)).to(packed.input_dtype)


def weight_of(inputs: int, outputs: int) -> Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0)) / inputs**0.5


@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
@pytest.mark.parametrize(("kind", "group"), KINDS)
def test_equals_the_twin_whatever_the_rows_beside(
    tier: str, kind: WeightType, group: int, inputs: int, outputs: int
) -> None:
    weight, bias = weight_of(inputs, outputs), torch.linspace(-1, 1, outputs)
    packed = PackedLinear([Part(weight, bias)], kind, group=group)
    rows = rows_of(packed)
    want = rows.double() @ stored(weight, Form(kind, group)).double().T + bias.double()
    got = packed(rows)
    assert close(got, want, tier, group)
    for count in COUNTS:
        assert torch.equal(packed(rows[:count]), got[:count])
        assert torch.equal(packed(rows[-count:]), got[-count:])


@pytest.mark.parametrize("kind", WeightType)
@pytest.mark.parametrize("activation", Activation)
@pytest.mark.parametrize("half", [16, 40, 5])
def test_gated_weights_give_activation_of_gate_times_up(
    tier: str, kind: WeightType, activation: Activation, half: int
) -> None:
    gate, up = weight_of(64, 2 * half).split(half)
    bias = torch.linspace(-2, 2, 2 * half)
    packed = PackedLinear([Part(gate, bias[:half]), Part(up, bias[half:])], kind, gated=True)
    rows = 3 * rows_of(packed, 9)
    got = packed(rows, epilogue=Epilogue.GATED, activation=activation)
    left = rows.double() @ stored(gate, Form(kind)).double().T + bias[:half]
    right = rows.double() @ stored(up, Form(kind)).double().T + bias[half:]
    want = ACTIVATIONS[activation](left) * right
    assert got.dtype == packed.input_dtype and got.shape == (9, half)
    torch.testing.assert_close(got.double(), want, rtol=1e-5 if kind is WeightType.F32 else 8e-3, atol=1e-5)


@pytest.mark.parametrize("kind", [WeightType.F32, WeightType.BF16, WeightType.INT4])
@pytest.mark.parametrize("width", [64, 65, 67])
def test_rows_may_lie_any_distance_apart(tier: str, kind: WeightType, width: int) -> None:
    packed = PackedLinear([Part(weight_of(64, 40))], kind)
    rows = rows_of(packed, 13)
    wide = torch.full((13, width), torch.nan, dtype=rows.dtype)
    wide[:, width - 64 :] = rows
    for count in (2, 4, 13):
        assert torch.equal(packed(wide[:count, width - 64 :]), packed(rows[:count]))


@pytest.mark.parametrize("outputs", [32, 50, 7])
def test_adds_to_rows_of_a_wider_array_and_touches_nothing_beside(tier: str, outputs: int) -> None:
    packed = PackedLinear([Part(weight_of(64, outputs))], WeightType.BF16)
    rows = rows_of(packed, 6)
    wide = torch.arange(6 * 64.0).reshape(6, 64)
    want = wide.clone()
    want[:, 3 : 3 + outputs] += packed(rows)
    packed(rows, wide[:, 3 : 3 + outputs], Epilogue.ADD)
    assert torch.equal(wide, want)


@pytest.mark.parametrize("kind", WeightType)
def test_matrices_packed_together_equal_each_alone(tier: str, kind: WeightType) -> None:
    parts = [Part(weight_of(96, outputs), torch.randn(outputs)) for outputs in (40, 8, 24)]
    together = PackedLinear(parts, kind)
    rows = rows_of(together, 5)
    alone = torch.cat([PackedLinear([part], kind)(rows) for part in parts], dim=1)
    assert torch.equal(together(rows), alone)


@pytest.mark.parametrize(("kind", "group"), KINDS)
@pytest.mark.parametrize("count", [1, 3, 30])
def test_threads_change_nothing(kind: WeightType, group: int, count: int) -> None:
    packed = PackedLinear([Part(weight_of(200, 3000))], kind, group=group)
    rows = rows_of(packed, count)
    use_threads(1)
    want = packed(rows)
    use_threads(3)
    results = [packed(rows) for _ in range(50)]
    use_threads(1)
    assert all(torch.equal(got, want) for got in results)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sources_of_half_precision_are_read_exactly(dtype: torch.dtype) -> None:
    tiny = torch.tensor([[1.0, -1.0, 6e-8, -6e-5, 0.0, 65504.0, 1 / 3, -(2**-14)]]).to(dtype)
    eye = torch.eye(8)
    assert torch.equal(PackedLinear([Part(tiny)], WeightType.F32)(eye).T, tiny.float())


@pytest.mark.parametrize(("kind", "group", "most"), [(WeightType.INT8, 0, 0.008), (WeightType.INT4, 32, 0.1)])
def test_quantizing_loses_little(kind: WeightType, group: int, most: float) -> None:
    weight = weight_of(576, 64)
    packed = PackedLinear([Part(weight)], kind, group=group)
    rows = rows_of(packed)
    want = rows.float() @ weight.T
    assert (packed(rows) - want).norm() <= most * want.norm()


@pytest.mark.parametrize("kind", WeightType)
def test_outputs_whose_weights_are_all_zero_give_zero(kind: WeightType) -> None:
    weight = weight_of(64, 40)
    weight[7] = 0
    packed = PackedLinear([Part(weight)], kind)
    assert torch.equal(packed(rows_of(packed, 9))[:, 7], torch.zeros(9))


def test_smaller_types_take_less_memory() -> None:
    sizes = [PackedLinear([Part(weight_of(1024, 1024))], kind).nbytes for kind in WeightType]
    assert [round(sizes[0] / size) for size in sizes] == [1, 2, 4, 8]


def test_rows_of_another_dtype_or_size_are_refused() -> None:
    packed = PackedLinear([Part(weight_of(64, 32))], WeightType.BF16)
    with pytest.raises(ValueError, match=r"rows are torch\.float32 \(1, 64\), not torch\.bfloat16 \[n, 64\]"):
        packed(torch.zeros(1, 64))
    with pytest.raises(ValueError, match=r"rows are torch\.bfloat16 \(1, 65\)"):
        packed(torch.zeros(1, 65, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="group is 48"):
        PackedLinear([Part(weight_of(64, 32))], WeightType.INT4, group=48)
