"""One request's life in the engine: waiting, running, finished."""

from __future__ import annotations

import enum
import math
from array import array

from ..messages import SamplingParams, Submit
from .adapters import NO_ADAPTER
from .kv_cache import BlockKey
from .masks import Guidance


class State(enum.Enum):
    COMPILING = "compiling"  # its grammar is not ready; the scheduler does not know it yet
    WAITING = "waiting"  # no slot, no blocks: new, or preempted
    RUNNING = "running"  # has a slot and blocks
    FINISHED = "finished"  # no more steps; slot and blocks go back when its last step in flight is collected


class Sequence:
    """Tokens known, tokens computed, and what the sequence holds on the device.

    There are no phases: a step closes the gap between `num_known_tokens` and `num_computed_tokens`. Both are as
    of the last launched step, so with a step in flight they run ahead of `token_ids`.
    """

    __slots__ = (
        "adapter",
        "arrival_s",
        "block_ids",
        "block_keys",
        "client",
        "guidance",
        "last_step",
        "max_new_tokens",
        "most_drafts",
        "most_tokens",
        "num_announced_blocks",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_known_tokens",
        "num_misled_steps",
        "num_prompt_tokens",
        "num_prompt_top_logprobs",
        "num_published_blocks",
        "prompt_logprobs",
        "prompt_top_logprobs",
        "queue_s",
        "rank",
        "request_id",
        "samples_on_host",
        "sampling",
        "slot",
        "started",
        "state",
        "steps_in_flight",
        "stop_token_ids",
        "token_ids",
    )

    def __init__(self, request: Submit, client: int, number: int, arrival_s: float, ageing_s: float) -> None:
        self.request_id = request.request_id
        self.client = client  # which connection the events go to
        self.token_ids = array("i", request.token_ids)
        self.num_prompt_tokens = request.num_prompt_tokens or len(request.token_ids)
        self.max_new_tokens = request.max_new_tokens
        self.most_tokens = self.num_prompt_tokens + request.max_new_tokens
        self.sampling: SamplingParams = request.sampling
        self.guidance: Guidance | None = None  # within its grammar, if there is one
        self.adapter = NO_ADAPTER  # that its tokens are computed with
        self.samples_on_host = False  # asks for something the device's sampler lacks
        self.most_drafts: int | None = None  # worth a try in its next step, see speculation.py; None: not tried yet
        self.num_misled_steps = 0  # in a row, with drafts of which none was right
        self.stop_token_ids = frozenset(request.stop_token_ids)
        self.arrival_s = arrival_s
        # Everybody who waits ages at the same rate, so ageing is a constant: arriving one ageing_s earlier is
        # worth one priority level, for ever. Lower runs first; `number` is unique and breaks ties.
        self.rank = (arrival_s + request.priority * ageing_s, number)
        self.state = State.WAITING
        self.slot = -1
        self.block_ids: list[int] = []
        self.block_keys: list[BlockKey] = []  # of the leading full blocks of token_ids
        self.num_published_blocks = 0  # leading blocks that the prefix index has
        self.num_announced_blocks = 0  # leading blocks the backend's table has
        self.num_cached_tokens = 0  # found in the prefix cache when it was last admitted
        self.num_computed_tokens = 0
        self.num_known_tokens = len(self.token_ids)  # those that launched steps draw are known to the device
        self.steps_in_flight = 0
        self.started = False  # has had its first step in this slot
        self.last_step = 0  # number of the last step it was part of
        self.queue_s: float | None = None
        # One per prompt token, NaN until computed; None: not asked for, or already told.
        self.prompt_logprobs: list[float] | None = None
        if request.prompt_logprobs and len(request.token_ids) == self.num_prompt_tokens:
            self.prompt_logprobs = [math.nan] * self.num_prompt_tokens
        # The best at the place of each, where they were asked for, and how many.
        self.num_prompt_top_logprobs = request.num_prompt_top_logprobs
        self.prompt_top_logprobs: list[list[tuple[int, float]]] | None = None
        if self.prompt_logprobs is not None and request.num_prompt_top_logprobs:
            self.prompt_top_logprobs = [[] for _ in range(self.num_prompt_tokens)]

    @property
    def num_generated_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def gap_tokens(self) -> int:
        """Known tokens that are not computed."""
        return self.num_known_tokens - self.num_computed_tokens

    def leave_device(self) -> None:
        """Forget slot, blocks and computed tokens; the caller has given them back."""
        self.slot = -1
        self.block_ids = []
        self.num_published_blocks = 0
        self.num_announced_blocks = 0
        self.num_computed_tokens = 0
        self.num_known_tokens = len(self.token_ids)
        self.started = False
