"""Speculation: guesses of a sequence's next tokens, verified all at once by a step that costs little more than one of
them alone.

A guess is right exactly when it is the token that is drawn in its place, so no text changes (backend/sampling.py: a
draw depends on seed, position and the tokens before, on nothing else). This file guesses, and says how many guesses a
sequence is worth. It knows no device; who has room for guesses is the scheduler's to say, which were right the
engine's.

Source: prompt lookup (github.com/apoorvumang/prompt-lookup-decoding): text repeats itself, so what followed the same
few tokens the last time may follow again.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Rows
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .sequence import Sequence

LEAST_MATCH = 2  # tokens; one alone recurs everywhere
LONGEST_MATCH = 16  # tokens; what agrees for so long has told where it comes from
LONGEST_PAUSE = 8  # steps without drafts, of a sequence whose drafts are always wrong


class Drafter(Protocol):
    def propose(self, token_ids: array[int], most: int) -> list[int]:
        """Up to `most` tokens, at least 1, that may follow; few or none where there is nothing to go by."""
        ...


class NgramDrafter:
    """Looks up where the sequence's last tokens occurred before, and proposes what followed there."""

    def propose(self, token_ids: array[int], most: int) -> list[int]:
        end = _last_match(np.frombuffer(token_ids, np.intc))
        if end < 0:
            return []
        drafts = token_ids[end + 1 : end + 1 + most].tolist()
        # What ran into the end of the sequence repeats itself with that period.
        return (drafts * -(-most // len(drafts)))[:most]


def _last_match(known: NDArray[np.intc]) -> int:
    """Where the longest suffix of i32 [t] that occurs before ends there, the last time; -1: there is none.

    Suffixes of LEAST_MATCH to LONGEST_MATCH tokens count.
    """
    if len(known) <= LEAST_MATCH:
        return -1
    ends = np.flatnonzero((known[1:-1] == known[-1]) & (known[:-2] == known[-2])) + 1
    # A text in a loop has many, and the last of them agrees as far as anybody looks.
    if len(ends) and ends[-1] >= LONGEST_MATCH:
        last = int(ends[-1]) + 1
        if np.array_equal(known[last - LONGEST_MATCH : last], known[-LONGEST_MATCH:]):
            return last - 1
    for length in range(LEAST_MATCH, LONGEST_MATCH):
        if len(ends) < 2:
            break
        ends_of_longer = ends[np.searchsorted(ends, length) :]
        ends_of_longer = ends_of_longer[known[ends_of_longer - length] == known[-1 - length]]
        if not len(ends_of_longer):
            break
        ends = ends_of_longer
    return int(ends[-1]) if len(ends) else -1


class Speculation:
    """Which drafts a sequence gets: as many as have lately been worth it."""

    def __init__(self, drafter: Drafter, max_drafts: int) -> None:
        self.max_drafts = max_drafts
        self._drafter = drafter

    def drafts(self, sequence: Sequence, room: int) -> list[int]:
        """Drafts behind the sequence's tokens, all of which the host knows; at most `room`, and no stop token."""
        if sequence.most_drafts is not None and sequence.most_drafts < 1:
            sequence.most_drafts += 1
            return []
        left = sequence.most_tokens - len(sequence.token_ids) - 1  # one more is drawn than there are drafts
        most = min(room, left, self.max_drafts if sequence.most_drafts is None else sequence.most_drafts)
        if most <= 0:
            return []
        drafts = self._drafter.propose(sequence.token_ids, most)[:most]
        for i, token_id in enumerate(drafts):
            if token_id in sequence.stop_token_ids:  # nothing comes after it
                return drafts[:i]
        return drafts

    def verified(self, sequence: Sequence, drafts: Rows[int], num_right: int) -> None:
        """After a step: one more than were right next time, twice as many where all were; where none was, one after a
        pause that grows with each such step.
        """
        if num_right == 0:
            sequence.num_misled_steps += 1
            sequence.most_drafts = 1 - min(sequence.num_misled_steps, LONGEST_PAUSE)
            return
        sequence.num_misled_steps = 0
        sequence.most_drafts = min(self.max_drafts, num_right * 2 if num_right == len(drafts) else num_right + 1)
