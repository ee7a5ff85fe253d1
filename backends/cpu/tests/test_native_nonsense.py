"""What the native kernels do with numbers that make no sense, and after threads or the tier were set anew."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tokenplane_core.backend.errors import BackendError
from tokenplane_core.backend.records import LoadOptions
from tokenplane_core.messages import SamplingParams
from tokenplane_core.model import describe_model
from tokenplane_cpu.attention import NativeKernels
from tokenplane_cpu.native import library, runnable_tiers, use_threads
from tokenplane_cpu.plugin import CpuBackend
from tokenplane_cpu.sampler import HostSampler
from tokenplane_cpu.structs import BLOCK_TOKENS
from tokenplane_torch.attention import AttentionRule
from tokenplane_torch.kv_cache import LayerShape
from tokenplane_torch.step import PagedStep, plan_step
from tokenplane_torch.testing import Driver
from tokenplane_torch.testing.driver import sampling_batch

LIBRARY = library()
NAN, INF = float("nan"), float("inf")

pytestmark = pytest.mark.skipif(LIBRARY is None, reason="tokenplane-cpu was installed without its native kernels")


PARAMS = {
    "greedy": SamplingParams(),
    "drawn": SamplingParams(temperature=1.0, seed=1),
    "filtered": SamplingParams(temperature=0.7, top_k=5, top_p=0.9, typical_p=0.9, min_p=0.1, seed=1),
    "logprobs": SamplingParams(temperature=1.0, seed=1, num_logprobs=5),
    "greedy logprobs": SamplingParams(num_logprobs=5),
    "biased": SamplingParams(logit_bias={3: 1.0}),
}


@pytest.mark.parametrize("nonsense", [NAN, -INF, INF])
@pytest.mark.parametrize("name", PARAMS)
def test_a_row_of_nonsense_is_an_error_and_no_token(tier: str, name: str, nonsense: float) -> None:
    logits = np.random.default_rng(0).normal(0, 1, (3, 1003)).astype(np.float32)
    batch = sampling_batch([PARAMS[name]] * 3, range(3))
    want = HostSampler().draw(logits, batch, None).token_ids
    assert ((want >= 0) & (want < 1003)).all()
    logits[1] = nonsense
    with pytest.raises(BackendError, match="no finite highest logit for 1 of 3 sequences"):
        HostSampler().draw(logits, batch, None)


@pytest.mark.parametrize("name", PARAMS)
def test_some_logits_that_are_nan_are_not_drawn(tier: str, name: str) -> None:
    logits = np.random.default_rng(0).normal(0, 1, (4, 1003)).astype(np.float32)
    without = np.where(np.arange(1003) % 3 == 0, np.float32(-INF), logits)
    batch = sampling_batch([PARAMS[name]] * 4, range(4))
    want = HostSampler().draw(without, batch, None)
    got = HostSampler().draw(np.where(np.isinf(without), np.float32(NAN), logits), batch, None)
    assert got.token_ids.tolist() == want.token_ids.tolist()


def attended(cache_dtype: torch.dtype, keys: torch.Tensor, values: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """What the tokens of one new sequence get."""
    kernels, tokens = NativeKernels(cache_dtype), len(keys)
    (cache,) = kernels.allocate([LayerShape(keys.shape[1], keys.shape[2], values.shape[2], keys.dtype)], 8)
    tables = np.arange(1, 8, dtype=np.int32)[None]
    arrays = (np.array([tokens], np.int32), np.zeros(1, np.int32), tables, np.ones(1, np.bool_))
    plan = plan_step(np.zeros(tokens, np.int32), *arrays, BLOCK_TOKENS, torch.from_numpy)
    rule = AttentionRule(keys.shape[2] ** -0.5, None, None, None)
    return PagedStep(plan, [cache], kernels).attend(0, query, keys, values, rule, None).float()


def random_heads(tokens: int, heads: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn((tokens, heads, 32), generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_query_that_is_nan_gets_nan_and_nothing_of_other_tokens(tier: str, dtype: torch.dtype) -> None:
    query, keys, values = (random_heads(150, heads, dtype, i) for i, heads in enumerate((4, 2, 2)))
    want = attended(dtype, keys, values, query)
    query[100:] = NAN
    got = attended(dtype, keys, values, query)
    assert torch.equal(got[:100], want[:100])
    assert got[100:].isnan().all()


@pytest.mark.parametrize("tiny", [1e-44, 1e-38, 3e-37])
def test_tiny_values_in_an_int8_cache_stay_tiny(tier: str, tiny: float) -> None:
    query, keys = (random_heads(40, heads, torch.bfloat16, i) for i, heads in enumerate((2, 2)))
    values = torch.full_like(keys, tiny)
    values[:, :, ::2] = 0
    assert (attended(torch.int8, keys, values, query).abs() <= 1.01 * tiny + 1e-44).all()
    finite = random_heads(40, 2, torch.bfloat16, 5)
    assert attended(torch.int8, keys * tiny, finite, query).isfinite().all()


@pytest.mark.parametrize("nonsense", [INF, -INF])
def test_an_infinite_value_in_an_int8_cache_reaches_its_own_head_only(tier: str, nonsense: float) -> None:
    query, keys, values = (random_heads(40, 2, torch.bfloat16, i) for i in range(3))
    want = attended(torch.int8, keys, values, query)
    values[0, 1, 7] = nonsense
    got = attended(torch.int8, keys, values, query)
    assert torch.equal(got[:, 0], want[:, 0])
    assert not got[:, 1].isfinite().any()


def test_a_program_serves_on_when_threads_or_the_tier_are_set_anew(checkpoint: Path) -> None:
    assert LIBRARY is not None
    plugin = CpuBackend()
    driver = Driver(plugin, plugin.load(describe_model(checkpoint), LoadOptions(num_threads=1)))
    prompt = [list(range(3, 200))]
    want, best = driver.generate(prompt, 8), LIBRARY.tp_isa()
    try:
        use_threads(5)
        assert driver.generate(prompt, 8) == want
        for name in runnable_tiers():
            LIBRARY.tp_set_isa(name.encode())
            assert driver.generate(prompt, 8) == want
    finally:
        LIBRARY.tp_set_isa(best)
        use_threads(1)
    plugin.close()


@pytest.mark.parametrize("token_id", [-1, 320, 2**31 - 1])
def test_a_token_that_the_vocabulary_lacks_computes_nan(checkpoint: Path, token_id: int) -> None:
    plugin = CpuBackend()
    driver = Driver(plugin, plugin.load(describe_model(checkpoint), LoadOptions(num_threads=1)))
    with pytest.raises(BackendError, match="no finite highest logit"):
        driver.generate([[5, token_id]], 1)
    plugin.close()


_EACH_IN_A_PROCESS = """
import os, torch
from ctypes import byref
from tokenplane_cpu.linear import PackedLinear, Part
from tokenplane_cpu.native import built_library
from tokenplane_cpu.structs import (
    AttentionStruct, DecoderStruct, Epilogue, LayerStruct, NormStruct, StepStruct, WeightType
)
lib = built_library()

def packed(outputs, inputs=32, kind=WeightType.BF16, gated=False):
    return PackedLinear([Part(torch.zeros(outputs, inputs))], kind, gated=gated)

weights = {"qkv": packed(96), "out": packed(32), "gate_up": packed(80, gated=True), "down": packed(32, 40)}
head = packed(50)
layers = (LayerStruct * 1)()
layer = layers[0]
layer.attention = AttentionStruct(heads=1, kv_heads=1, key_dim=32, value_dim=32)
for name, weight in weights.items():
    setattr(layer, name, weight.struct)
decoder = DecoderStruct(layers=layers, head=head.struct, num_layers=1, hidden=32, max_tokens=4, max_keys=64)
numbers = torch.zeros(64, dtype=torch.int32)
norm = NormStruct(torch.ones(64).data_ptr(), 1e-5, 24)

def create():
    return lib.tp_program_create(byref(decoder))

def step(tokens=1, rows=1, new=1, context=0, wanted=0, **sizes):
    at = [torch.tensor([value] * 4, dtype=torch.int32) for value in (context, new, wanted)]
    given = dict(zip(("context_lens", "num_new", "wanted"), (tensor.data_ptr() for tensor in at)))
    sizes = {"tokens": tokens, "rows": rows, "table_stride": 2, "num_wanted": 1, "num_logits": 0} | sizes
    lib.tp_program_step(create(), byref(StepStruct(token_ids=numbers.data_ptr(), **given, **sizes)))

for case in CASES:
    if os.fork() == 0:
        exec(case)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""

_NONSENSE = {
    "layer.rotary_pairs = 17; create()": "a decoder: rotary_pairs is more than key_dim / 2",
    "layer.attention.kv_heads = 3; create()": "a decoder: its heads are no multiple",
    "layer.attention.type = 3; create()": "a decoder: its heads are no multiple of its KV heads, or no cache",
    "layer.qkv = packed(95).struct; create()": "a decoder: qkv does not give",
    "layer.out = packed(32, 31).struct; create()": "a decoder: out does not take",
    "layer.gate_up = packed(80).struct; create()": "a decoder: gate_up is not gated",
    "layer.down = packed(32, 39).struct; create()": "a decoder: gate_up is not gated, or does not give what down takes",
    "layer.down = packed(32, 40, WeightType.F32).struct; create()": "a decoder: gate_up gives another type",
    "layer.down = packed(31, 40).struct; create()": "a decoder: down does not give the hidden size",
    "layer.key_norm = norm; create()": "a decoder: a norm is of no size of its heads",
    "decoder.head = packed(50, 31).struct; create()": "a decoder: the head does not take the hidden size",
    "decoder.head = packed(50, 32, WeightType.INT8).struct; create()": "a decoder: a quantized head is no embedding",
    "decoder.num_layers = 0; create()": "a decoder: an empty one",
    "step(tokens=5, new=5)": "a step: more tokens than max_tokens",
    "step(rows=5, new=0)": "a step: more rows than max_tokens",
    "step(tokens=3, new=2)": "a step: its rows have not as many tokens as it has",
    "step(new=-1)": "a step: a row of less than no tokens",
    "step(context=64)": "a step: a position beyond max_keys",
    "step(context=2**31 - 1)": "a step: a position beyond max_keys",
    "step(context=32, table_stride=1)": "a step: a position beyond its block table",
    "step(num_wanted=5)": "a step: more wanted tokens than max_tokens",
    "step(num_logits=2)": "a step: more logits than wanted tokens",
    "step(wanted=1)": "a step: a wanted token that it does not have",
    "lib.tp_program_logits(create(), 0, 1, None)": "tp_program_logits: of tokens that the last step did not want",
    "packed(33, gated=True)": "a packed weight: gated, and an odd number of outputs",
    "packed(0)": "a packed weight: without outputs or inputs",
    "lib.tp_linear_packed_bytes(4, 32, 32, 0, 0)": "a packed weight: of no type that it may have",
    "lib.tp_linear_packed_bytes(3, 32, 32, 48, 0)": "a packed weight: group is no multiple of 32",
    "packed(32)._pack(Part(torch.zeros(3, 32)), 30)": "tp_linear_pack: outputs that the weight does not have",
    "packed(32)(torch.zeros(1, 32).bfloat16(), epilogue=Epilogue.GATED)": "tp_linear: TP_GATED goes with gated weights",
    "packed(32, gated=True)(torch.zeros(1, 32).bfloat16())": "tp_linear: TP_GATED goes with gated weights, and they",
}


def test_what_cannot_be_computed_ends_the_process_with_a_line_that_says_why() -> None:
    script = f"CASES = {list(_NONSENSE)!r}\n{_EACH_IN_A_PROCESS}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == [str(-signal.SIGABRT)] * len(_NONSENSE), done.stderr
    for line, says in zip(done.stderr.splitlines(), _NONSENSE.values(), strict=True):
        assert line.startswith(f"tokenplane-cpu: {says}")
