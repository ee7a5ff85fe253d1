"""The law of speculation: guesses change how fast a text comes, never the text."""

from __future__ import annotations

import random
from array import array
from typing import Any

from ..messages import SamplingParams
from .mask_laws import GRAMMAR, LotteryGrammars
from .runner import LocalEngine, Outcome
from .sampling_laws import replace_seed
from .subject import NotApplicable, Subject, law, same

MAX_DRAFTS = 4
_NUM_TOKENS = 20
_CASES = (
    SamplingParams(),
    SamplingParams(temperature=1.0, top_k=20),
    SamplingParams(frequency_penalty=0.8, presence_penalty=0.4),
    SamplingParams(temperature=0.8, repetition_penalty=1.5, num_logprobs=2),
)


class ForesightedDrafter:
    """Knows the texts, and is wrong now and then: then what comes behind the mistake is right again."""

    def __init__(self, texts: list[list[int]], vocab_size: int, seed: int = 0, mistakes: float = 0.25) -> None:
        self._texts, self._vocab_size, self._mistakes = texts, vocab_size, mistakes
        self._rng = random.Random(seed)

    def propose(self, token_ids: array[int], most: int) -> list[int]:
        known = token_ids.tolist()
        text = next((text for text in self._texts if text[: len(known)] == known), known)
        drafts = text[len(known) : len(known) + self._rng.randint(0, most)]
        return [self._other(token_id) if self._rng.random() < self._mistakes else token_id for token_id in drafts]

    def _other(self, token_id: int) -> int:
        return (token_id + self._rng.randrange(1, self._vocab_size)) % self._vocab_size


@law
def speculation_equals_none(subject: Subject) -> None:
    """Texts with drafts, right ones and wrong ones, are those without: greedy, seeded, penalised and under a grammar.

    Rows with drafts, other decode rows and prompts share all batches; once more with chunked prompts, and with
    sequences that are preempted.
    """
    engine = subject.engine(max_drafts=MAX_DRAFTS)
    engine.close()
    if engine.capabilities.max_drafts == 0:
        raise NotApplicable("max_drafts is 0")
    sampling = engine.capabilities.sampling
    guided = sampling.returns_logits or "mask" in sampling.features
    prompts = subject.prompts(2 * len(_CASES), seed=50, longest=60)
    plain = _outcomes(subject.engine(**_grammars(subject, guided)), prompts, guided)
    texts = [prompt + outcome.token_ids for prompt, outcome in zip(prompts, plain, strict=True)]
    tight = max(4 * engine.engine.layout.block_tokens, 96)
    circumstances: tuple[tuple[str, dict[str, Any]], ...] = (
        ("", {}),
        (", in chunks", {"max_step_tokens": 24}),
        (", with preemption", {"kv_cache_tokens": tight, "reshuffle": True}),
    )
    for i, (circumstance, options) in enumerate(circumstances):
        drafter = ForesightedDrafter(texts, subject.model.vocab_size, seed=i)
        fast = subject.engine(max_drafts=MAX_DRAFTS, drafter=drafter, **options, **_grammars(subject, guided))
        got = _outcomes(fast, prompts, guided)
        same([o.token_ids for o in got], [o.token_ids for o in plain], f"with drafts{circumstance}")
        for ours, theirs in zip(got, plain, strict=True):
            off = [abs(a - b) for a, b in zip(ours.logprobs, theirs.logprobs, strict=True)]
            assert max(off, default=0) <= 1e-3, f"with drafts{circumstance}: logprobs are off by {max(off)}"
        stats = fast.engine.stats
        assert 0 < stats.draft_tokens_accepted < stats.draft_tokens, (
            f"with drafts{circumstance}: {stats.draft_tokens_accepted} of {stats.draft_tokens} drafts were right"
        )


def _grammars(subject: Subject, guided: bool) -> dict[str, Any]:
    return {"grammars": LotteryGrammars(subject.model.vocab_size)} if guided else {}


def _outcomes(engine: LocalEngine, prompts: list[list[int]], guided: bool) -> list[Outcome]:
    """Each set of parameters twice, once under a grammar where there are any; the second half comes a little later."""
    ids = []
    for i, prompt in enumerate(prompts):
        grammar = GRAMMAR if guided and i % 2 else None
        ids.append(engine.submit(prompt, _NUM_TOKENS, replace_seed(_CASES[i // 2], i), grammar=grammar))
        if i >= len(prompts) // 2:
            engine.step()
    engine.run()
    engine.close()
    return [engine.outcomes[i] for i in ids]
