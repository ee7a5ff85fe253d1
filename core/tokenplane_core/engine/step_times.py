"""What steps cost and how batches form, counted for the metrics. A few microseconds for each step, nothing per token.

A step's life: `planned` just before the backend gets it, `read_back` when its output is on the host, `committed` when
its tokens are with their sequences, `published` when the clients have been told.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from time import perf_counter

from ..durations import Durations
from .scheduler import Plan
from .shapes import Phase


class StepTimes:
    """Durations by phase ("prefill": a step with at least one prompt row)."""

    def __init__(self) -> None:
        self.inference: defaultdict[str, Durations] = defaultdict(Durations)
        self.forward: defaultdict[str, Durations] = defaultdict(Durations)
        self.commit: defaultdict[str, Durations] = defaultdict(Durations)
        self.publish: defaultdict[str, Durations] = defaultdict(Durations)
        self.admitted: Counter[int] = Counter()  # how often so many requests were taken from the queue at once
        self.num_joined = 0  # steps in which new requests joined running ones
        self._phase: Phase = "decode"
        self._mark_s = 0.0

    def planned(self, plan: Plan, num_running: int) -> float:
        """Before the launch; returns the time of it, for `read_back`."""
        if plan.phase == "prefill":
            num_new = sum(row.sequence.queue_s is None for row in plan.rows)
            if num_new:
                self.admitted[num_new] += 1
                self.num_joined += num_new < num_running
        return perf_counter()

    def read_back(self, phase: Phase, launched_s: float, device_s: float) -> None:
        self._phase, self._mark_s = phase, perf_counter()
        self.inference[phase].add(self._mark_s - launched_s)
        self.forward[phase].add(device_s)

    def committed(self) -> None:
        before_s, self._mark_s = self._mark_s, perf_counter()
        self.commit[self._phase].add(self._mark_s - before_s)

    def publishing(self) -> None:
        self._mark_s = perf_counter()

    def published(self) -> None:
        self.publish[self._phase].add(perf_counter() - self._mark_s)
