"""Masks say of every token what trying it says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from helpers.model_folder import make_text_model
from tokenplane_core.engine.grammar import Guide, LLGrammars
from tokenplane_core.engine.masks import Guidance, GuidedRow, PendingMasks, StepMasks, edits_for
from tokenplane_core.messages import Grammar, SamplingParams

REGEXES = ("(yes|no)", "[0-9]{3}", "[a-z]*")
STOP = 2
BANNED = (40, 41, 300)


@pytest.fixture(params=[(500, 1), (512, 1), (512, 3), (500, 3)], ids=lambda value: "vocab {} threads {}".format(*value))
def grammars(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LLGrammars]:
    vocab_size, num_threads = request.param
    found = LLGrammars(make_text_model(tmp_path / "m", vocab_size), vocab_size)
    found._num_threads = num_threads  # as on a machine with more cores
    yield found
    found.close()


def row(grammars: LLGrammars, draw: int, guide: Guide, banned: tuple[int, ...] = (), to_come: int = 0) -> GuidedRow:
    params = SamplingParams(logit_bias=dict.fromkeys(banned, -np.inf))
    return draw, Guidance(guide, edits_for(params, frozenset({STOP}), grammars._vocab_size), to_come), ()


def drawable(grammars: LLGrammars, row: GuidedRow) -> set[int]:
    """What trying every token on a row's guide says."""
    _, guidance, _ = row
    matcher, vocab_size = guidance.guide.matcher, grammars._vocab_size  # type: ignore[attr-defined]
    allowed = {t for t in range(vocab_size) if matcher.deep_copy().consume_token(t)} - {STOP}
    return allowed | ({STOP} if matcher.is_accepting() and guidance.tokens_to_come <= 0 else set())


def allowed(masks: StepMasks, draw: int) -> set[int]:
    bits = np.unpackbits(masks.words[masks.rows[draw]].view(np.uint8), bitorder="little")
    return set(np.flatnonzero(bits).tolist())


def test_masks_are_what_trying_every_token_says(grammars: LLGrammars) -> None:
    vocab_size = grammars._vocab_size
    guides = [grammars.compile(Grammar("regex", regex)).result() for regex in REGEXES]
    rows = [row(grammars, 2 * i, guide, BANNED if i == 2 else (), i == 1) for i, guide in enumerate(guides)]
    pending = PendingMasks(grammars, rows)
    masks = pending.result()
    assert pending.token_mask().words() is masks.words and masks.words.flags.c_contiguous
    assert masks.words.shape == (3, -(-vocab_size // 32))
    for i, found in enumerate(rows):
        expected = drawable(grammars, found) - set(BANNED if i == 2 else ())
        assert allowed(masks, 2 * i) == expected
        assert {t for t in range(-40, vocab_size + 40) if masks.allows(2 * i, t)} == expected


def test_a_guide_takes_in_what_was_drawn_when_the_next_mask_is_built(grammars: LLGrammars) -> None:
    digits, letters = (row(grammars, i, grammars.compile(Grammar("regex", REGEXES[1 + i])).result()) for i in range(2))
    before = PendingMasks(grammars, [digits, letters]).result()
    known = before.words.copy()
    for length in (1, 2):
        digits[1].behind.append(min(t for t in allowed(before, 0)))
        masks = PendingMasks(grammars, [digits, letters]).result()
        assert not digits[1].behind and allowed(masks, 1) == allowed(before, 1)
        assert allowed(masks, 0) == drawable(grammars, digits), length
    assert (before.words == known).all(), "the masks of a step stay as they are"


def test_behind_a_draft_is_the_mask_of_the_text_with_it(grammars: LLGrammars) -> None:
    guide = grammars.compile(Grammar("regex", "[0-9]{1,2}")).result()
    draw, guidance, _ = row(grammars, 3, guide, to_come=2)
    right = min(drawable(grammars, (draw, guidance, ())))
    wrong = max(set(range(grammars._vocab_size)) - drawable(grammars, (draw, guidance, ())))
    other = row(grammars, 7, grammars.compile(Grammar("regex", "[0-9]{1,2}")).result())
    masks = PendingMasks(grammars, [(draw, guidance, (right, wrong, right)), other]).result()
    assert list(masks.rows) == [3, 4, 7] and len(masks.words) == 5
    ahead = guide.ahead_by(right)
    assert ahead is not None and guide.ahead_by(wrong) is None
    assert allowed(masks, 3) == allowed(masks, 7) == drawable(grammars, other)
    assert allowed(masks, 4) == drawable(grammars, (4, Guidance(ahead, guidance.edits, 1), ()))
    assert STOP not in allowed(masks, 4), "min_new_tokens wants another token"
    assert (masks.words[2:4] == ~np.uint32(0)).all(), "the backend may draw anything there"
    assert not any(masks.allows(i, right) for i in (5, 6)), "which does not count"
    assert drawable(grammars, (draw, guidance, ())) == allowed(masks, 3), "the sequence's own guide does not move"


def test_a_guide_that_failed_allows_nothing_and_the_others_go_on(grammars: LLGrammars) -> None:
    broken, whole = (grammars.compile(Grammar("regex", "ab+")).result() for _ in range(2))
    assert not broken.consume(200)
    assert broken.error
    masks = PendingMasks(grammars, [row(grammars, i, guide) for i, guide in enumerate((broken, whole))]).result()
    assert (masks.stuck, masks.finished) == ({0}, frozenset())


def test_a_text_that_is_complete_and_may_not_stop_is_finished(grammars: LLGrammars) -> None:
    complete, waits = (row(grammars, i, grammars.compile(Grammar("regex", "x")).result(), to_come=i) for i in range(2))
    for _, guidance, _ in (complete, waits):
        guidance.behind.append(min(drawable(grammars, (0, guidance, ()))))
    waits[1].tokens_to_come = 2
    masks = PendingMasks(grammars, [complete, waits]).result()
    assert (allowed(masks, 0), masks.finished, masks.stuck) == ({STOP}, {1}, frozenset())
