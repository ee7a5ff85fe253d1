"""Range checks whose message names field, value and limit. Both dialects use them with limits of their own."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from tokenplane_core.validation import GREEDY_BELOW, MAX_TEMPERATURE

from .errors import invalid
from .settings import Limits


def check_range(
    field: str,
    value: float,
    low: float | None = None,
    high: float | None = None,
    *,
    low_open: bool = False,
    high_open: bool = False,
) -> None:
    """Raise unless low <= value <= high; an open end is itself excluded."""
    below = low is not None and (value <= low if low_open else value < low)
    above = high is not None and (value >= high if high_open else value > high)
    if below or above:
        least = None if low is None else f"{'greater than' if low_open else 'at least'} {_shown(low)}"
        most = None if high is None else f"{'less than' if high_open else 'at most'} {_shown(high)}"
        rule = " and ".join(part for part in (least, most) if part)
        raise invalid(f"`{field}` must be {rule}, but it is {_shown(value)}", field)


def check_stops(field: str, stops: Sequence[str], most: int) -> tuple[str, ...]:
    if len(stops) > most:
        raise invalid(f"`{field}` may hold up to {most} strings, but it holds {len(stops)}", field)
    if "" in stops:
        raise invalid(f"`{field}` must not hold an empty string: it would end every answer at once", field)
    return tuple(stops)


def is_one_of(value: Any, allowed: Sequence[Any]) -> bool:
    """Whether a JSON value is one of some; true is not 1, and false not 0."""
    return any(value == one and type(value) is type(one) for one in allowed)


def check_repetition_penalty(value: float) -> None:
    """TGI asks for more than 0; the bounds keep float32 logits finite."""
    check_range("repetition_penalty", value, 0.01, 100)


def usable_temperature(value: float) -> float:
    """The temperature as the core takes it; native clients may send any above 0."""
    return 0.0 if value < GREEDY_BELOW else min(value, MAX_TEMPERATURE)


def draw_seed() -> int:
    """A seed for a client that named none; 53 bits, so that every JSON reader can repeat it exactly."""
    return secrets.randbits(53)


def check_prompt_length(field: str, num_tokens: int, limits: Limits, code: str = "invalid_value") -> None:
    if num_tokens == 0:
        raise invalid(f"`{field}` is empty: it has no tokens to continue", field)
    if num_tokens > limits.max_input_tokens:
        raise invalid(
            f"`{field}` has {num_tokens} tokens, the limit is {limits.max_input_tokens};"
            f" shorten it by {num_tokens - limits.max_input_tokens} tokens",
            field,
            code,
        )


def _shown(value: float) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
