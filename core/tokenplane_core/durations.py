"""Counts of durations in buckets: the part of a histogram that is filled while tokens flow.

The bounds are those TGI uses for every metric whose name ends in `duration`, so that its dashboards read ours.
"""

from __future__ import annotations

from bisect import bisect_left

import msgspec

BOUNDS_S = tuple(0.0001 * 1.5**n for n in range(1, 36))
"""Upper bounds, 0.00015 s to 145.6 s; a further bucket takes what is longer."""


class Durations(msgspec.Struct):
    """Counts for each bucket (one more than bounds) and the sum. Well under a microsecond for each `add`."""

    counts: list[int] = msgspec.field(default_factory=lambda: [0] * (len(BOUNDS_S) + 1))
    sum_s: float = 0.0

    def add(self, duration_s: float, times: int = 1) -> None:
        """Count `times` durations of equal length."""
        self.counts[bisect_left(BOUNDS_S, duration_s)] += times
        self.sum_s += duration_s * times

    @property
    def total(self) -> int:
        return sum(self.counts)
