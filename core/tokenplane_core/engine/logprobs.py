"""Log-probabilities on their way from a step's output to the client: of drawn tokens, and of a prompt's own."""

from __future__ import annotations

from collections.abc import Sequence as Rows

import numpy as np
from msgspec.structs import replace

from ..backend.records import F32, I32, StepOutput
from ..messages import SamplingParams, TokenEvent
from .scheduler import Plan, Row
from .sequence import Sequence


def drawn_logprobs(
    params: SamplingParams, output: StepOutput, index: int
) -> tuple[list[float] | None, list[list[tuple[int, float]]] | None]:
    """The event's logprob fields for one sampled row that asked for them."""
    if output.logprobs is None:
        return None, None
    chosen = [float(output.logprobs[index])]
    if output.top_ids is None or output.top_logprobs is None:
        return chosen, [[]]
    k = params.num_logprobs
    return chosen, [_pairs(output.top_ids[index, :k], output.top_logprobs[index, :k])]


def num_prompt_logprobs(row: Row) -> int:
    """How many log-probabilities of prompt tokens the row computes: one after each token that has such a successor."""
    sequence = row.sequence
    if sequence.prompt_logprobs is None:
        return 0
    return max(0, min(row.num_tokens, sequence.num_prompt_tokens - 1 - row.start_tokens))


def next_token_ids(rows: Rows[Row], row_starts: I32) -> I32 | None:
    """As in PrefillBatch."""
    if not any(map(num_prompt_logprobs, rows)):
        return None
    out = np.full(row_starts[-1], -1, np.int32)
    for row, at in zip(rows, row_starts, strict=False):
        count, first = num_prompt_logprobs(row), row.start_tokens + 1
        out[at : at + count] = row.sequence.token_ids[first : first + count]
    return out


def num_prompt_top_logprobs(rows: Rows[Row]) -> int:
    """As in PrefillBatch."""
    return max((row.sequence.num_prompt_top_logprobs for row in rows if num_prompt_logprobs(row)), default=0)


def keep_prompt_logprobs(plan: Plan, output: StepOutput) -> None:
    """Give each row its part of the output, where it belongs in the prompt."""
    if output.prompt_logprobs is None:
        return
    start = 0
    for row in plan.rows:
        sequence, count = row.sequence, num_prompt_logprobs(row)
        known, best = sequence.prompt_logprobs, sequence.prompt_top_logprobs
        if known is None or not count:
            continue
        first, end = row.start_tokens + 1, start + count
        known[first : first + count] = output.prompt_logprobs[start:end].tolist()
        if best is not None and output.prompt_top_ids is not None and output.prompt_top_logprobs is not None:
            k = sequence.num_prompt_top_logprobs
            ids, values = output.prompt_top_ids[start:end, :k], output.prompt_top_logprobs[start:end, :k]
            best[first : first + count] = map(_pairs, ids, values)
        start = end


def _pairs(ids: I32, values: F32) -> list[tuple[int, float]]:
    return list(zip(ids.tolist(), values.tolist(), strict=True))


def with_prompt_logprobs(event: TokenEvent, sequence: Sequence) -> TokenEvent:
    """The event, telling them if that is still to be done.

    Changes:
        They are told; should the sequence be preempted, the prefix cache may serve it.
    """
    if sequence.prompt_logprobs is None:
        return event
    event = replace(event, prompt_logprobs=sequence.prompt_logprobs, prompt_top_logprobs=sequence.prompt_top_logprobs)
    sequence.prompt_logprobs = sequence.prompt_top_logprobs = None
    return event
