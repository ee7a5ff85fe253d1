"""What each route takes and answers, declared where the route is. openapi.py makes the document from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from .errors import (
    GENERATION,
    MALFORMED,
    MEDIA_TYPE,
    NOT_READY,
    OVERLOADED,
    TIMEOUT,
    TOO_LARGE,
    VALIDATION,
    ErrorKind,
)

Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])

READS = (MALFORMED, TOO_LARGE, MEDIA_TYPE, VALIDATION)
"""What may be wrong with any body."""

GENERATES = (*READS, OVERLOADED, NOT_READY, GENERATION, TIMEOUT)
"""And what may happen where text is generated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """As a decorator of an endpoint it notes what that takes and answers; what it is for, the docstring says.

    takes: schemas of the body, of which one fits. answers: schemas of the JSON of a 200, likewise. events: schemas of
    the events, where the answer may be a stream. text: content type of an answer that is no JSON.
    """

    id: str
    tag: str
    takes: tuple[Any, ...] = ()
    answers: tuple[Any, ...] = ()
    events: tuple[Any, ...] = ()
    text: str | None = None
    errors: tuple[ErrorKind, ...] = ()

    def __call__(self, endpoint: Endpoint) -> Endpoint:
        _OPERATIONS[endpoint] = self
        return endpoint


_OPERATIONS: dict[Callable[..., Any], Operation] = {}


def operation_of(endpoint: Callable[..., Any]) -> Operation:
    """Raises KeyError for an endpoint that declares nothing."""
    return _OPERATIONS[endpoint]
