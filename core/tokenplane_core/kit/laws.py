"""The laws every backend keeps. Each is a function of a `Subject`, raises AssertionError when broken and NotApplicable
when the backend declares that it cannot do what the law is about.

Most run the core's own engine over the plugin, twice in different circumstances, and demand the same text. Which
text is right, only `text_is_right` says, for a tiny Llama that numpy can compute; a backend's own tests compare real
models.
"""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import msgspec

from ..backend.plugins import Backend, installed
from ..backend.records import SAMPLING_FEATURES, Capabilities, ModelSpec, SamplingCaps
from ..messages import SamplingParams
from .runner import LocalEngine, Outcome

VENDOR_LIBRARIES = ("torch", "transformers", "jax", "torch_xla", "habana_frameworks", "torch_neuronx", "triton")


class NotApplicable(Exception):
    """The backend does not claim what this law is about; the message says which claim is missing."""


@dataclass(frozen=True)
class Subject:
    """A backend under test: how to make its plugin object, and the model it runs."""

    name: str
    make_plugin: Callable[[], object]
    model: ModelSpec
    reference: Callable[[list[int], int], list[int]] | None = None  # prompt, tokens -> the greedy text it must give

    def engine(self, **options: Any) -> LocalEngine:
        """A freshly loaded engine; options as LocalEngine's."""
        return LocalEngine(self.make_plugin, self.model, self.name, **options)

    def prompts(self, count: int, seed: int = 0, longest: int = 96) -> list[list[int]]:
        """Random prompts of mixed length; the first has a single token."""
        rng = random.Random(f"{self.name} {seed}")
        longest = min(longest, self.model.max_model_tokens // 3)
        lengths = [1] + [rng.randint(1, longest) for _ in range(count - 1)]
        return [[rng.randrange(self.model.vocab_size) for _ in range(length)] for length in lengths]


Law = Callable[[Subject], None]
LAWS: dict[str, Law] = {}


def law(function: Law) -> Law:
    """Add a function to LAWS under its name."""
    LAWS[function.__name__] = function
    return function


def _singly(
    subject: Subject, prompts: list[list[int]], num_tokens: int, sampling: SamplingParams | None = None
) -> list[list[int]]:
    """Each prompt alone, in an engine without prefix cache: the plainest circumstances."""
    engine = subject.engine(prefix_cache=False, async_depth=0)
    texts = [engine.generate([prompt], num_tokens, sampling)[0] for prompt in prompts]
    engine.close()
    return texts


def _same(got: list[list[int]], expected: list[list[int]], circumstance: str) -> None:
    for i, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        if ours != theirs:
            pairs = enumerate(zip(ours, theirs, strict=False))
            at = next((k for k, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
            raise AssertionError(
                f"{circumstance}: prompt {i} differs from token {at} on:"
                f" {ours[at : at + 8]} instead of {theirs[at : at + 8]}"
            )


# --- Being found --------------------------------------------------------------------------------------------


@law
def detect_is_quick_and_clear(subject: Subject) -> None:
    """detect() answers within two seconds, with devices or with a reason."""
    start_s = perf_counter()
    report = Backend(subject.name, subject.make_plugin()).detect()
    elapsed_s = perf_counter() - start_s
    assert elapsed_s < 2, f"detect() took {elapsed_s:.1f} s"
    assert (report.status == "found") == bool(report.devices), (
        f"status {report.status} with {len(report.devices)} devices"
    )
    assert report.devices or report.reason, f"status {report.status} without a reason"


@law
def import_is_clean(subject: Subject) -> None:
    """Importing the plugin and making its object loads no vendor library."""
    point = installed().get(subject.name)
    if point is None:
        raise NotApplicable("the plugin is not installed as an entry point")
    code = (
        f"import sys, {point.module} as m; m.{point.attr}();"
        f"print([name for name in {VENDOR_LIBRARIES!r} if name in sys.modules])"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert child.returncode == 0, child.stderr
    assert child.stdout.strip() == "[]", f"importing {point.value} loads {child.stdout.strip()}"


@law
def capabilities_are_honest(subject: Subject) -> None:
    """What load() declares is consistent, and the declared extremes really run."""
    engine = subject.engine()
    caps = engine.capabilities
    _consistent(caps)
    vocab, longest = subject.model.vocab_size, caps.limits.max_model_tokens
    full = engine.generate(subject.prompts(engine.engine.layout.num_slots, longest=8), 4)
    assert all(len(text) == 4 for text in full), "a batch of max_sequences rows lost tokens"
    capacity = min(longest, engine.engine.pool.num_total * engine.engine.layout.block_tokens)
    text = engine.generate([[i % vocab for i in range(capacity - 2)]], 2)[0]
    assert len(text) == 2, "a sequence of max_model_tokens lost tokens"
    assert all(0 <= token < vocab for token in sum(full, text)), "a token outside the vocabulary"
    engine.close()


def _consistent(caps: Capabilities) -> None:
    limits, shapes = caps.limits, caps.shapes
    assert caps.sampling.features <= SAMPLING_FEATURES, (
        f"unknown sampling features {caps.sampling.features - SAMPLING_FEATURES}"
    )
    for name in ("max_sequences", "max_step_tokens", "max_model_tokens", "max_prefill_rows"):
        assert getattr(limits, name) >= 1, f"limits.{name} is {getattr(limits, name)}"
    assert caps.kv.block_bytes > 0 and caps.kv.budget_bytes >= 0, "the KV cache has no size"
    if caps.kv.kind == "slot":
        assert caps.kv.block_tokens == limits.max_model_tokens, "a slot's line must hold max_model_tokens"
    if shapes.mode == "hard":
        rows = max((b.rows for b in shapes.buckets if b.phase == "decode"), default=0)
        assert rows >= limits.max_sequences, f"max_sequences is {limits.max_sequences}, the widest decode bucket {rows}"


# --- The right text -----------------------------------------------------------------------------------------


@law
def text_is_right(subject: Subject) -> None:
    """Greedy text equals a plain computation without cache, for short prompts and for one that fills the context."""
    if subject.reference is None:
        raise NotApplicable("no reference for this model (or for a dtype below float32)")
    longest = subject.model.max_model_tokens - 8
    prompts = [*subject.prompts(4, seed=12), *([i * step % 83 for i in range(longest)] for step in (7, 11))]
    engine = subject.engine()
    capacity = engine.engine.pool.num_total * engine.engine.layout.block_tokens
    prompts = [prompt for prompt in prompts if len(prompt) + 8 <= capacity]
    _same(engine.generate(prompts, 8), [subject.reference(p, 8) for p in prompts], "compared with the reference")
    engine.close()


# --- The same text in all circumstances ---------------------------------------------------------------------


@law
def batch_equals_singles(subject: Subject) -> None:
    """Prompts of mixed length, run together, give what each gives alone."""
    prompts = subject.prompts(9)
    engine = subject.engine()
    _same(engine.generate(prompts, 12), _singly(subject, prompts, 12), "in a batch")
    engine.close()


@law
def decode_equals_prefill(subject: Subject) -> None:
    """Every token that decoding gave is the token a prefill of all before it gives."""
    engine = subject.engine(prefix_cache=False)
    # Two prompts whose texts cross into new blocks together, whatever the block size: one alone would not notice
    # that its new block is the padding block.
    boundary = min(engine.engine.layout.block_tokens, subject.model.max_model_tokens - 20)
    crossing = [[i % base for i in range(max(boundary - 9, 1))] for base in (5, 7)]
    prompts = [*subject.prompts(3, seed=10, longest=40), *crossing]
    texts = engine.generate(prompts, 20)
    for k in (1, 2, 7, 18, 19):
        longer = [prompt + text[:k] for prompt, text in zip(prompts, texts, strict=True)]
        _same(
            engine.generate(longer, 1),
            [text[k : k + 1] for text in texts],
            f"prefilled instead of decoded ({k} tokens)",
        )
    engine.close()


@law
def chunked_prefill_equals_whole(subject: Subject) -> None:
    """A prompt computed in pieces gives what it gives in one go."""
    prompts = subject.prompts(5, seed=1, longest=200)
    whole = _singly(subject, prompts, 8)
    for max_step_tokens in (16, 48):
        engine = subject.engine(max_step_tokens=max_step_tokens)
        if engine.capabilities.limits.chunk_tokens == 0:
            raise NotApplicable("limits.chunk_tokens is 0: prompts are never split")
        _same(engine.generate(prompts, 8), whole, f"in steps of {engine.capabilities.limits.max_step_tokens} tokens")
        engine.close()


@law
def prefix_hit_equals_recompute(subject: Subject) -> None:
    """Tokens found in the cache serve as well as tokens computed anew, from prompts and from generated text."""
    engine = subject.engine()
    if not engine.engine.pool.prefix_cache:
        raise NotApplicable("slot-addressed KV cannot be shared")
    size = engine.engine.layout.block_tokens
    if 2 * size + 16 > subject.model.max_model_tokens:
        raise NotApplicable(f"max_model_tokens holds no two blocks of {size}")
    rng = random.Random(2)
    first = [rng.randrange(subject.model.vocab_size) for _ in range(size + 3)]
    text = engine.generate([first], size)[0]
    follow_up = first + text + [1]
    prompts = [first, follow_up]
    ids = [engine.submit(prompt, 8) for prompt in prompts]
    engine.run()
    hits = [engine.outcomes[i].num_cached_tokens for i in ids]
    assert hits[0] >= size and hits[1] >= 2 * size, f"expected hits of {size} and {2 * size} tokens, got {hits}"
    _same([engine.outcomes[i].token_ids for i in ids], _singly(subject, prompts, 8), "with a prefix hit")
    engine.close()


@law
def preempted_equals_uninterrupted(subject: Subject) -> None:
    """Sequences thrown out for lack of blocks and recomputed go on as if nothing had happened."""
    probe = subject.engine()
    if probe.capabilities.kv.kind == "slot":
        raise NotApplicable("slot-addressed KV never runs out of blocks")
    size, longest = probe.engine.layout.block_tokens, subject.model.max_model_tokens
    probe.close()
    # Three prompts of just under a block that each grow into their second: four blocks hold two of them.
    prompts = [p[:1] * (size - 2) for p in subject.prompts(3, seed=3)]
    num_tokens = min(12, longest - size)
    # Among a few ids the counts decide: a resumed sequence must still know which of its tokens it generated.
    counting = SamplingParams(frequency_penalty=1.0, logit_bias=dict.fromkeys(range(3, 8), 1000.0))
    for name, sampling in (("", None), (" with penalties", counting)):
        engine = subject.engine(kv_cache_tokens=4 * size)
        got = engine.generate(prompts, num_tokens, sampling)
        assert engine.engine.stats.requests_preempted > 0, "nothing was preempted: the law has lost its subject"
        _same(got, _singly(subject, prompts, num_tokens, sampling), f"after preemption{name}")
        engine.close()


@law
def padding_changes_nothing(subject: Subject) -> None:
    """Batches of every size up to 9 give what single rows give, whatever bucket they are padded to."""
    engine = subject.engine(prefix_cache=False)
    if not engine.capabilities.shapes.buckets:
        raise NotApplicable("no buckets: nothing is ever padded")
    prompts = subject.prompts(9, seed=4)
    singles = _singly(subject, prompts, 5)
    for count in range(2, 10):
        _same(engine.generate(prompts[:count], 5), singles[:count], f"in a batch of {count}")
    engine.close()


@law
def slot_reuse_leaks_nothing(subject: Subject) -> None:
    """A sequence does not notice who had its slot and its blocks before."""
    prompts = subject.prompts(6, seed=5)
    engine = subject.engine(max_sequences=1, prefix_cache=False)
    _same([engine.generate([p], 6)[0] for p in prompts], _singly(subject, prompts, 6), "in a used slot")
    engine.close()


@law
def neighbours_do_not_disturb(subject: Subject) -> None:
    """A long sequence keeps its text while others come, finish and are cancelled around it."""
    prompts = subject.prompts(13, seed=6, longest=40)
    num_tokens = min(48, subject.model.max_model_tokens - 41)
    engine = subject.engine()
    long_id = engine.submit(prompts[0], num_tokens)
    for i, prompt in enumerate(prompts[1:]):
        short_id = engine.submit(prompt, 4)
        for _ in range(3):
            engine.step()
        if i % 3 == 0:
            engine.cancel(short_id)
    engine.run()
    _same([engine.outcomes[long_id].token_ids], _singly(subject, prompts[:1], num_tokens), "among changing neighbours")
    engine.close()


@law
def async_depth_changes_nothing(subject: Subject) -> None:
    """Launching a step before the last one is read back gives the same text."""
    engine = subject.engine()
    if engine.capabilities.async_depth == 0:
        raise NotApplicable("async_depth is 0")
    prompts = subject.prompts(7, seed=7)
    one_by_one = subject.engine(async_depth=0)
    _same(engine.generate(prompts, 10), one_by_one.generate(prompts, 10), "at async depth 1")
    engine.close()
    one_by_one.close()


@law
def no_compile_after_warmup(subject: Subject) -> None:
    """A device of compiled shapes compiles nothing while it serves."""
    engine = subject.engine()
    if engine.capabilities.shapes.mode != "hard":
        raise NotApplicable("shapes are not hard")
    for seed in range(3):
        engine.generate(subject.prompts(4 + 3 * seed, seed=seed), 4)
    assert engine.engine.stats.compiled_shapes == 0, (
        f"{engine.engine.stats.compiled_shapes} shapes compiled while serving"
    )
    engine.close()


@law
def close_twice_is_fine(subject: Subject) -> None:
    """close() may be called again, and before load()."""
    engine = subject.engine()
    engine.generate(subject.prompts(1), 1)
    engine.close()
    engine.close()
    Backend(subject.name, subject.make_plugin()).close()


# --- Sampling -----------------------------------------------------------------------------------------------

SAMPLING_CASES = {
    "greedy": SamplingParams(),
    "greedy tie": SamplingParams(logit_bias={9: 2.0**29, 4: 2.0**29}),  # float32 makes the two logits equal
    "drawn tie": SamplingParams(temperature=1.0, top_k=1, logit_bias={9: 2.0**29, 4: 2.0**29}),
    "temperature": SamplingParams(temperature=0.8),
    "top_k": SamplingParams(temperature=1.0, top_k=5),
    "top_p": SamplingParams(temperature=1.1, top_p=0.6),
    "min_p": SamplingParams(temperature=1.0, min_p=0.2),
    "typical_p": SamplingParams(temperature=0.9, typical_p=0.5),
    "repetition_penalty": SamplingParams(repetition_penalty=1.7),
    "presence_penalty": SamplingParams(presence_penalty=1.5),
    "frequency_penalty": SamplingParams(temperature=0.7, frequency_penalty=0.9),
    "logit_bias": SamplingParams(temperature=1.0, logit_bias={0: 3.0, 1: float("-inf"), 2: -2.5}),
    "logprobs": SamplingParams(temperature=0.9, num_logprobs=4),
    "processed_logprobs": SamplingParams(temperature=0.9, top_k=20, num_logprobs=4, processed_logprobs=True),
    "all": SamplingParams(
        temperature=1.2,
        top_k=30,
        top_p=0.9,
        min_p=0.01,
        typical_p=0.95,
        repetition_penalty=1.2,
        presence_penalty=0.3,
        frequency_penalty=0.2,
        logit_bias={3: 1.5},
        num_logprobs=2,
    ),
}


@law
def seed_means_the_same_everywhere(subject: Subject) -> None:
    """A seeded draw does not depend on the batch, on what ran before, or on how the prompt was cut."""
    prompts = subject.prompts(6, seed=8)
    params = [SamplingParams(temperature=1.0, seed=(i << 40) + 100) for i in range(len(prompts))]
    alone = subject.engine(prefix_cache=False, async_depth=0)
    expected = [alone.generate([prompt], 8, p)[0] for prompt, p in zip(prompts, params, strict=True)]
    for circumstance, options in (("in a batch", {}), ("with chunked prompts", {"max_step_tokens": 16})):
        engine = subject.engine(**options)
        ids = [engine.submit(prompt, 8, p) for prompt, p in zip(prompts, params, strict=True)]
        engine.run()
        _same([engine.outcomes[i].token_ids for i in ids], expected, f"seeded, {circumstance}")
        engine.close()
    alone.close()


@law
def filters_bite(subject: Subject) -> None:
    """What can be said without logits: top_k 1 is greedy, a banned id is never drawn, a hugely favoured one always."""
    engine = subject.engine()
    prompts = subject.prompts(4, seed=11, longest=24)
    greedy = engine.generate(prompts, 6)
    _same(engine.generate(prompts, 6, SamplingParams(temperature=1.5, top_k=1, seed=3)), greedy, "top_k 1")
    banned = {text[0]: float("-inf") for text in greedy}
    texts = engine.generate(prompts, 12, SamplingParams(temperature=1.0, logit_bias=banned))
    drawn = set().union(*texts) & set(banned)
    assert not drawn, f"banned ids were drawn: {drawn}"
    favoured = engine.generate(prompts, 6, SamplingParams(temperature=1.0, logit_bias={5: 1e4}))
    _same(favoured, [[5] * 6] * len(prompts), "a bias of 10,000")
    engine.close()


@law
def sampler_keeps_the_law(subject: Subject) -> None:
    """The device draws what the reference sampler draws from the device's own logits, and reports its logprobs.

    All parameter sets run together, greedy rows among them, so that no row may take another's; once more with
    chunked prompts, with prefix hits, and with preemption, where penalties must still count the right tokens.
    """
    host = subject.engine(prefix_cache=False, adjust=lambda caps: replace(caps, sampling=SamplingCaps(frozenset())))
    if not host.capabilities.sampling.returns_logits or not subject.engine().capabilities.sampling.returns_logits:
        raise NotApplicable("sampling.returns_logits is False: there is nothing to compare with")
    expected = _sampled(subject, host)
    host.close()
    circumstances: tuple[tuple[str, dict[str, Any]], ...] = (
        ("", {}),
        (" in chunks", {"max_step_tokens": 16}),
        (" after preemption", {"kv_cache_tokens": max(4 * host.engine.layout.block_tokens, 96)}),
    )
    for circumstance, options in circumstances:
        device = subject.engine(**options)
        for again in ("", ", a second time (prefix hits)"):
            got = _sampled(subject, device)
            for name, ours, theirs in zip(_CASE_ROWS, got, expected, strict=True):
                _same_samples(f"{name}{circumstance}{again}", ours, theirs)
        device.close()


_CASE_ROWS = [name for name in SAMPLING_CASES for _ in range(2)]


def _sampled(subject: Subject, engine: LocalEngine) -> list[Outcome]:
    """Two prompts with each set of parameters, all at once."""
    prompts = subject.prompts(len(_CASE_ROWS) + 1, seed=9, longest=40)[1:]
    ids = [
        engine.submit(prompt, 8, replace_seed(SAMPLING_CASES[name], (7 * i) << 34))
        for i, (name, prompt) in enumerate(zip(_CASE_ROWS, prompts, strict=True))
    ]
    engine.run()
    return [engine.outcomes[i] for i in ids]


def _same_samples(name: str, ours: Outcome, theirs: Outcome) -> None:
    _same([ours.token_ids], [theirs.token_ids], f"sampling with {name}")
    assert len(ours.logprobs) == len(theirs.logprobs), f"{name}: {len(ours.logprobs)} logprobs"
    assert _close(ours.logprobs, theirs.logprobs), f"{name}: {ours.logprobs} instead of {theirs.logprobs}"
    for mine, other in zip(ours.top_logprobs, theirs.top_logprobs, strict=True):
        assert _close([v for _, v in mine], [v for _, v in other]), f"{name}: {mine} instead of {other}"
        for (my_id, value), (other_id, _) in zip(mine, other, strict=True):
            # Ids may change places only where their values are as good as equal.
            near = {i for i, v in other if abs(v - value) <= 1e-3}
            assert my_id == other_id or my_id in near, f"{name}: ids of {mine} instead of {other}"


def replace_seed(params: SamplingParams, seed: int) -> SamplingParams:
    """The same parameters with another seed."""
    return msgspec.structs.replace(params, seed=seed)


def _close(ours: list[float], theirs: list[float], tolerance: float = 1e-3) -> bool:
    return all(a == b or abs(a - b) <= tolerance * max(1.0, abs(b)) for a, b in zip(ours, theirs, strict=True))
