"""Which request kills the engine: those that were in it at several deaths are run again one by one.

Engines die for many reasons, so a death alone says nothing about a request. One that has lived through SUSPECT_AFTER
deaths is a suspect. As long as there are suspects, the engine holds one of them and nothing else: if it dies, that
request did it; if the request gets on by its trial's number of tokens, it is acquitted and waits for the others. What
arrives meanwhile waits, too: mostly far less than a second for each suspect, whereas every further death would cost all
of them a restart. A later trial of the same request asks for twice as many tokens, so that one which kills only now and
then is found as well.

Knows requests and when they may run; it knows neither processes nor sockets.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .request_stream import RequestStream

SUSPECT_AFTER = 2
FIRST_TRIAL_TOKENS = 8


class Trials:
    """The suspects in order, and the one that runs alone now."""

    def __init__(self) -> None:
        self.defendant: RequestStream | None = None
        self._suspects: deque[RequestStream] = deque()
        self._goal_tokens = 0

    def open(self, requests: Iterable[RequestStream]) -> None:
        """Line up the suspects among the requests that a new engine is to take over, and try the first."""
        self._suspects = deque(request for request in requests if request.num_deaths >= SUSPECT_AFTER)
        self._next()

    def adjourn(self) -> RequestStream | None:
        """The engine has died: nobody runs. Returns who was alone in it."""
        culprit, self.defendant = self.defendant, None
        return culprit

    def is_over(self) -> bool:
        """True if the defendant has ended or has got on by its number of tokens."""
        request = self.defendant
        return request is not None and (request.has_ended or len(request.emitted) >= self._goal_tokens)

    def acquit(self) -> RequestStream | None:
        """Try the next; returns the request just tried, if it has still to go on. One more death makes it a suspect."""
        request = self.defendant
        self._next()
        if request is None or request.has_ended:
            return None
        request.num_deaths = SUSPECT_AFTER - 1
        request.trial_tokens *= 2
        return request

    def _next(self) -> None:
        while self._suspects and self._suspects[0].has_ended:
            self._suspects.popleft()
        self.defendant = self._suspects.popleft() if self._suspects else None
        if self.defendant is not None:
            self._goal_tokens = len(self.defendant.emitted) + self.defendant.trial_tokens
