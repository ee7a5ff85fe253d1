"""Laws of masks: a token that a grammar forbids is never drawn, and rows without a grammar do not notice.

The grammars here need no tokenizer: which ids they allow is a pseudo-random choice that depends on the last token.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence as Rows
from concurrent.futures import Future
from typing import Any

import numpy as np

from ..backend.records import U32, Bool, Capabilities
from ..engine.grammar import Guide
from ..messages import Grammar, SamplingParams
from .runner import LocalEngine, Outcome
from .sampling_laws import replace_seed, without_sampler
from .subject import NotApplicable, Subject, law, same

GRAMMAR = Grammar("lark", "start: /any/")
"""What it says does not matter: LotteryGrammars makes its own."""

_NUM_TOKENS = 12
_CASES = (
    SamplingParams(),
    SamplingParams(temperature=3.0),
    SamplingParams(temperature=1.0, top_k=3, top_p=0.9, min_p=0.01),
    SamplingParams(temperature=0.8, repetition_penalty=1.5, presence_penalty=2.0, logit_bias={5: 50.0}),
    SamplingParams(temperature=2.0, typical_p=0.7, num_logprobs=2, processed_logprobs=True),
    SamplingParams(num_logprobs=2),
)


class LotteryGuide:
    """Allows about one id in eight, at least one, depending on the token before."""

    error = ""

    def __init__(self, vocab_size: int, number: int) -> None:
        self._vocab_size, self._number = vocab_size, number
        self._last = vocab_size  # nothing yet

    def allowed(self) -> Bool:
        chosen: Bool = np.random.default_rng((self._number, self._last)).random(self._vocab_size) < 0.125
        chosen[self._last % self._vocab_size] = True
        return chosen

    def consume(self, token_id: int) -> bool:
        if not self.allowed()[token_id]:
            return False
        self._last = token_id
        return True

    def ahead_by(self, token_id: int) -> LotteryGuide | None:
        other = copy.copy(self)
        return other if other.consume(token_id) else None


class LotteryGrammars:
    """Every request gets a lottery of its own, so that rows have unlike masks."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size, self._num_guides = vocab_size, 0

    def compile(self, grammar: Grammar) -> Future[Guide]:
        ready: Future[Guide] = Future()
        ready.set_result(LotteryGuide(self._vocab_size, self._num_guides))
        self._num_guides += 1
        return ready

    def allowed(self, guides: Rows[Any]) -> tuple[U32, list[bool]]:
        bits = np.zeros((len(guides), -(-self._vocab_size // 32) * 32), np.bool_)
        for row, guide in zip(bits, guides, strict=True):
            row[: self._vocab_size] = guide.allowed()
        packed = np.packbits(bits, axis=-1, bitorder="little")
        return packed.view("<u4").astype(np.uint32), [False] * len(guides)

    def close(self) -> None:
        pass


@law
def masks_are_never_violated(subject: Subject) -> None:
    """Under a mask, whatever else a request asks for, the device draws what the reference sampler draws.

    Guided and free rows share all batches; once more with chunked prompts, and with sequences that are preempted.
    """
    capabilities = _capabilities(subject)
    expected = None
    circumstances: list[tuple[str, dict[str, Any]]] = [
        ("together", {}),
        ("in chunks", {"max_step_tokens": 16}),
        ("with preemption", {"kv_cache_tokens": 256}),
    ]
    if capabilities.sampling.returns_logits and "mask" in capabilities.sampling.features:
        circumstances.insert(0, ("drawn by the core", {"adjust": without_sampler}))
    for circumstance, options in circumstances:
        outcomes = _outcomes(subject, options)
        for i, outcome in enumerate(outcomes):
            assert outcome.finish_reason == "length", f"{circumstance}, row {i}: {outcome.error}"
        texts = [outcome.token_ids for outcome in outcomes]
        expected = expected or texts
        same(texts, expected, f"guided and free rows {circumstance}")


@law
def masks_concern_nobody_else(subject: Subject) -> None:
    """A free row gives the same text beside guided rows as alone."""
    _capabilities(subject)
    prompts = subject.prompts(4, seed=21, longest=40)
    alone = subject.engine()
    expected = alone.generate(prompts, _NUM_TOKENS)
    alone.close()
    together = subject.engine(grammars=LotteryGrammars(subject.model.vocab_size))
    free = []
    for prompt in prompts:
        together.submit(prompt[::-1], _NUM_TOKENS, grammar=GRAMMAR)
        free.append(together.submit(prompt, _NUM_TOKENS))
    together.run()
    same([together.outcomes[i].token_ids for i in free], expected, "free rows beside guided ones")
    together.close()


def _outcomes(subject: Subject, options: dict[str, Any]) -> list[Outcome]:
    """Each set of parameters with a grammar and without."""
    engine: LocalEngine = subject.engine(grammars=LotteryGrammars(subject.model.vocab_size), **options)
    prompts = subject.prompts(2 * len(_CASES), seed=20, longest=60)
    ids = [
        engine.submit(prompt, _NUM_TOKENS, replace_seed(_CASES[i // 2], i), grammar=GRAMMAR if i % 2 == 0 else None)
        for i, prompt in enumerate(prompts)
    ]
    engine.run()
    engine.close()
    return [engine.outcomes[i] for i in ids]


def _capabilities(subject: Subject) -> Capabilities:
    """Of the subject. Raises NotApplicable if it cannot serve grammars at all."""
    engine: LocalEngine = subject.engine()
    engine.close()
    sampling = engine.capabilities.sampling
    if not sampling.returns_logits and "mask" not in sampling.features:
        raise NotApplicable('sampling.features lacks "mask" and sampling.returns_logits is False')
    return engine.capabilities
