"""Masks say of every token what trying it says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from helpers.model_folder import make_text_model
from tokenplane_core.engine.grammar import GuidedRow, LLGrammars, PendingMasks
from tokenplane_core.messages import Grammar

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


def test_masks_are_what_trying_every_token_says(grammars: LLGrammars) -> None:
    vocab_size = grammars._vocab_size
    guides = [grammars.compile(Grammar("regex", regex)).result() for regex in REGEXES]
    rows = [GuidedRow(i, guide, (STOP,), BANNED if i == 2 else (), i != 1) for i, guide in enumerate(guides)]
    words = PendingMasks(grammars, vocab_size, rows).result().words
    assert words.shape == (3, -(-vocab_size // 32))
    bits = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")
    assert not bits[:, vocab_size:].any()
    for row, of_row in zip(rows, bits, strict=True):
        matcher = row.guide.matcher  # type: ignore[attr-defined]
        expected = {t for t in range(vocab_size) if matcher.deep_copy().consume_token(t)} - {*row.banned_ids}
        expected = expected - {STOP} | ({STOP} if matcher.is_accepting() and row.may_stop else set())
        assert set(np.flatnonzero(of_row[:vocab_size]).tolist()) == expected


def test_a_guide_that_failed_allows_nothing_and_the_others_go_on(grammars: LLGrammars) -> None:
    broken, whole = (grammars.compile(Grammar("regex", "ab+")).result() for _ in range(2))
    assert not broken.consume(200)
    assert broken.error
    rows = [GuidedRow(i, guide, (STOP,), (), True) for i, guide in enumerate((broken, whole))]
    masks = PendingMasks(grammars, grammars._vocab_size, rows).result()
    assert (masks.stuck, masks.finished) == ({0}, frozenset())
