"""One sequence on its way from the engine to a client: token events in, pieces of text out.

What both dialects share. Knows stop strings and incomplete characters, knows no JSON and no HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Literal, Protocol

from tokenplane_core.backend.errors import InvalidRequest, TokenplaneError
from tokenplane_core.client_adapters import LoadedAdapter
from tokenplane_core.messages import Grammar, SamplingParams, Submit, TokenEvent

from .text.stop_strings import StopStrings
from .text.stream_decoder import StreamDecoder
from .text.tokenizer import TextTokenizer

MAX_MERGED_PIECES = 64
"""Read ahead of a slow client; what it has not come to yet stays with the engine client, which bounds it."""

FinishReason = Literal["length", "eos_token", "stop_sequence"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationSpec:
    """What to generate for one sequence, as both dialects convert it from their JSON."""

    prompt_text: str  # "" if the client sent token ids
    prompt_ids: list[int]
    max_new_tokens: int
    sampling: SamplingParams
    stop: tuple[str, ...] = ()
    keep_stop: bool = False  # the stop string stays at the end of the text
    ignore_eos: bool = False
    shown_token_ids: frozenset[int] = frozenset()  # special tokens that stay in the text
    grammar: Grammar | None = None  # what the whole text must be; see structured.py
    grammar_field: str = "grammar"  # the request's field that says so, for errors
    wants_tokens: bool = False  # pieces list their tokens
    wants_token_texts: bool = False  # ... with the text of each, special tokens included
    wants_prompt_logprobs: bool = False  # see prompt_tokens()
    num_prompt_top_logprobs: int = 0  # ... and of so many alternatives to each
    adapter: LoadedAdapter | None = None  # that it is computed with

    def submit(self, request_id: str, stop_token_ids: list[int]) -> Submit:
        return Submit(
            request_id=request_id,
            token_ids=self.prompt_ids,
            max_new_tokens=self.max_new_tokens,
            sampling=self.sampling,
            stop_token_ids=[] if self.ignore_eos else stop_token_ids,
            grammar=self.grammar,
            prompt_logprobs=self.wants_prompt_logprobs,
            num_prompt_top_logprobs=self.num_prompt_top_logprobs,
            adapter=self.adapter.number if self.adapter is not None else 0,
        )


@dataclass(slots=True)
class GeneratedToken:
    id: int
    logprob: float | None
    top_logprobs: list[tuple[int, float]]
    start: int  # where its text begins, in characters of the generated text
    text: str = ""  # only with wants_token_texts
    is_special: bool = False
    is_stop: bool = False  # the token that ended the sequence; it adds nothing to the text


@dataclass(slots=True)
class Piece:
    """What one engine event added. `text` may be shown at once: no stop string can begin in it."""

    text: str
    tokens: list[GeneratedToken]
    finish_reason: FinishReason | None


@dataclass(slots=True)
class PromptToken:
    id: int
    text: str  # those of all tokens, joined, are the prompt, special tokens included
    logprob: float | None  # None for the first: nothing stands before it
    top_logprobs: list[tuple[int, float]]  # (id, logprob), best first; as many as the spec wants


class TokenStream(Protocol):
    """The engine client's RequestStream."""

    async def __anext__(self) -> TokenEvent: ...
    def cancel(self) -> None: ...
    def give_up(self, error: TokenplaneError) -> None: ...


@dataclass(slots=True)
class Times:
    """perf_counter() readings of one generation."""

    arrived_s: float
    queued_s: float = 0.0
    started_s: float = 0.0  # the engine took it into its first step
    first_token_s: float = 0.0
    ended_s: float = 0.0


class Generation:
    """One request to the engine being read, as an async iterator of pieces.

    Passes on the RequestError that the engine client raises when the engine refuses the request or dies. `cancel` may
    be called at any time, any number of times, and must be called by whoever stops reading early.
    """

    def __init__(
        self,
        spec: GenerationSpec,
        stream: TokenStream,
        tokenizer: TextTokenizer,
        times: Times,
        on_finish: Callable[[Generation], None],
    ) -> None:
        self.spec = spec
        self.times = times
        self.num_tokens = 0  # generated, the stop token included
        self.num_cached_tokens = 0
        self.prompt_logprobs: list[float] | None = None  # from the first piece on, if the spec wants them
        self.prompt_top_logprobs: list[list[tuple[int, float]]] | None = None  # with them
        self.finish_reason: FinishReason | None = None
        self._stream = stream
        self._tokenizer = tokenizer
        self._on_finish = on_finish
        self._decoder = StreamDecoder(
            tokenizer, skip_special_tokens=True, prompt_ids=spec.prompt_ids, shown_ids=spec.shown_token_ids
        )
        self._token_decoder = (
            StreamDecoder(tokenizer, skip_special_tokens=False, prompt_ids=spec.prompt_ids)
            if spec.wants_token_texts
            else None
        )
        self._stops = StopStrings(spec.stop, keep_stop=spec.keep_stop)
        self._num_decoded_chars = 0
        self._num_given_chars = 0
        self._first_event: TokenEvent | None = None  # read by accepted(), not shown yet

    def cancel(self) -> None:
        self._stream.cancel()

    def give_up(self, error: TokenplaneError) -> None:
        """As cancel, but who reads gets the error."""
        self._stream.give_up(error)

    def __aiter__(self) -> Generation:
        return self

    async def accepted(self) -> None:
        """Wait until the engine has compiled the grammar; at once without one. To be called before the first piece.

        Raises:
            InvalidRequest: the grammar cannot be compiled; names the request's field.
        """
        if self.spec.grammar is not None and self._first_event is None:
            self._first_event = await self._next_event()

    async def __anext__(self) -> Piece:
        if self.finish_reason is not None:
            raise StopAsyncIteration
        event, self._first_event = self._first_event or await self._next_event(), None
        self._note_start(event)
        piece = self._advance(event)
        if piece.finish_reason is not None:
            self.finish_reason = piece.finish_reason
            self.times.ended_s = perf_counter()
            self._on_finish(self)
        return piece

    async def _next_event(self) -> TokenEvent:
        try:
            return await self._stream.__anext__()
        except InvalidRequest as error:
            if error.field != "grammar":
                raise
            raise InvalidRequest(f"`{self.spec.grammar_field}`: {error}", self.spec.grammar_field) from None

    def _note_start(self, event: TokenEvent) -> None:
        if event.queue_s is not None:
            self.times.started_s = self.times.queued_s + event.queue_s
            self.num_cached_tokens = event.num_cached_tokens
        if event.prompt_logprobs is not None:
            self.prompt_logprobs = event.prompt_logprobs
            self.prompt_top_logprobs = event.prompt_top_logprobs
        if event.token_ids and not self.times.first_token_s:
            self.times.first_token_s = perf_counter()

    def _advance(self, event: TokenEvent) -> Piece:
        """Decode the event's tokens up to a stop string, if one is hit."""
        text: list[str] = []
        tokens: list[GeneratedToken] = []
        for i, token_id in enumerate(event.token_ids):
            self.num_tokens += 1
            is_stop = event.finish_reason == "stop_token" and i == len(event.token_ids) - 1
            if self.spec.wants_tokens:
                tokens.append(self._token(event, i, is_stop))
            if not is_stop:
                text.append(self._show(self._decoder.push(token_id)))
            if self._stops.hit is not None:
                self.cancel()
                break
        if self._stops.hit is None and event.finish_reason is not None:
            text.append(self._finish_text(tokens))
        piece = Piece("".join(text), tokens, self._finish_reason(event))
        self._num_given_chars += len(piece.text)
        if piece.finish_reason == "stop_sequence" and tokens and self.spec.wants_token_texts:
            self._trim(tokens[-1])
        return piece

    def _show(self, text: str) -> str:
        self._num_decoded_chars += len(text)
        if self.num_tokens <= self.spec.sampling.min_new_tokens:
            return text  # before that, nothing ends the answer
        return self._stops.push(text) if text else ""

    def _finish_text(self, tokens: list[GeneratedToken]) -> str:
        """What the decoders and the stop strings still hold back when the engine says that it is over."""
        text = self._show(self._decoder.flush())
        if self._token_decoder is not None and tokens:
            tokens[-1].text += self._token_decoder.flush()
        return text if self._stops.hit is not None else text + self._stops.flush()

    def _finish_reason(self, event: TokenEvent) -> FinishReason | None:
        if self._stops.hit is not None:
            return "stop_sequence"
        match event.finish_reason:
            case "stop_token":
                return "eos_token"
            case "length":
                return "length"
            case _:
                return None

    def _token(self, event: TokenEvent, i: int, is_stop: bool) -> GeneratedToken:
        token_id = event.token_ids[i]
        token = GeneratedToken(
            id=token_id,
            logprob=event.logprobs[i] if event.logprobs else None,
            top_logprobs=event.top_logprobs[i] if event.top_logprobs else [],
            start=self._num_decoded_chars,
            is_stop=is_stop,
        )
        if self._token_decoder is not None:
            token.text = self._token_decoder.push(token_id)
            token.is_special = self._tokenizer.is_special(token_id)
        return token

    def _trim(self, last: GeneratedToken) -> None:
        """The last token may reach beyond the stop string; the client sees the text end where it ends."""
        surplus = self._num_decoded_chars - self._num_given_chars
        if surplus > 0:
            last.text = last.text[:-surplus]


def prompt_tokens(generation: Generation, tokenizer: TextTokenizer) -> list[PromptToken]:
    """The prompt with its log-probabilities: [] until the first piece, and where the spec does not want them."""
    if generation.prompt_logprobs is None:
        return []
    decoder = StreamDecoder(tokenizer, skip_special_tokens=False)
    tops = generation.prompt_top_logprobs or [[]] * len(generation.prompt_logprobs)
    known = zip(generation.spec.prompt_ids, generation.prompt_logprobs, tops, strict=True)
    tokens = [PromptToken(token_id, decoder.push(token_id), logprob, top) for token_id, logprob, top in known]
    tokens[0].logprob = None
    tokens[-1].text += decoder.flush()
    return tokens


@dataclass(slots=True)
class Output:
    """A whole answer, collected."""

    generation: Generation
    text: str = ""
    tokens: list[GeneratedToken] = field(default_factory=list)
    finish_reason: FinishReason = "length"

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.tokens += piece.tokens
        self.finish_reason = piece.finish_reason or self.finish_reason


async def accepted(generations: Sequence[Generation]) -> None:
    """Wait until the engine has compiled the grammars of all. Raises as Generation.accepted."""
    for generation in generations:
        await generation.accepted()


async def collect(generations: Sequence[Generation]) -> list[Output]:
    """Read all generations to their ends; outputs are in their order."""
    outputs = [Output(generation) for generation in generations]
    async for index, piece in merge(generations):
        outputs[index].add(piece)
    return outputs


async def merge(generations: Sequence[Generation]) -> AsyncGenerator[tuple[int, Piece], None]:
    """Pieces of several generations as they come, each with its generation's index. The first failure ends all."""
    if len(generations) == 1:
        async for piece in generations[0]:
            yield 0, piece
        return
    arrived: asyncio.Queue[tuple[int, Piece] | Exception | None] = asyncio.Queue(MAX_MERGED_PIECES)

    async def pump(index: int, generation: Generation) -> None:
        try:
            async for piece in generation:
                await arrived.put((index, piece))
            await arrived.put(None)
        except Exception as error:
            await arrived.put(error)

    pumps = [asyncio.create_task(pump(i, generation)) for i, generation in enumerate(generations)]
    try:
        num_live = len(pumps)
        while num_live:
            item = await arrived.get()
            if item is None:
                num_live -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield item
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
