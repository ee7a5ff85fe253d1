"""What the API process and the engine process say to each other: typed msgpack messages, never pickle.

Border: Submit, Cancel, LoadAdapter and UnloadAdapter one way; Ready, Events, AdapterLoaded, Stats and Fatal the other.
Every message is one frame on a unix socket: a length (u32, little endian) and that many bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Literal

import msgspec

from .durations import Durations
from .memory import MemoryRow

FinishReason = Literal["length", "stop_token", "error"]

MAX_FRAME_BYTES = 1 << 28


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True):
    """How one request draws its tokens. Meanings and order: backend/sampling.py. The defaults are greedy."""

    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0  # u64; the caller draws one when the client names none
    logit_bias: dict[int, float] = {}
    min_new_tokens: int = 0  # until then the stop tokens are banned
    num_logprobs: int = -1  # -1: none; 0: of the drawn token; k: also of the k best
    processed_logprobs: bool = False  # of the distribution drawn from (TGI) instead of the model's (OpenAI)


class Grammar(msgspec.Struct, frozen=True):
    """What the generated text must be. engine/grammar.py gives it its meaning; equal grammars are compiled once."""

    kind: Literal["json_schema", "regex", "lark"]
    source: str  # a JSON Schema as JSON text; a regular expression for the whole text; a Lark grammar


class Submit(msgspec.Struct, tag="submit", frozen=True, omit_defaults=True):
    """A request. `token_ids` is the prompt, then what was already generated if the request outlived its engine."""

    request_id: str
    token_ids: list[int]
    max_new_tokens: int  # counted from num_prompt_tokens, so a resumed request states the same number again
    num_prompt_tokens: int = 0  # 0: all of token_ids
    sampling: SamplingParams = SamplingParams()
    stop_token_ids: list[int] = []
    priority: int = 0  # lower runs earlier; see scheduler.py for ageing
    prompt_logprobs: bool = False  # computes the whole prompt: finds nothing in the prefix cache
    num_prompt_top_logprobs: int = 0  # with prompt_logprobs: also of the k best at each place
    grammar: Grammar | None = None
    adapter: int = 0  # number of the LoRA adapter it is computed with; 0: none


class Cancel(msgspec.Struct, tag="cancel", frozen=True):
    request_id: str


class LoadAdapter(msgspec.Struct, tag="load_adapter", frozen=True):
    """Requests that come after this one may use the adapter."""

    number: int  # from 1 on, never given twice
    name: str
    path: str  # folder with adapter_config.json and adapter_model.safetensors


class UnloadAdapter(msgspec.Struct, tag="unload_adapter", frozen=True):
    """No more requests will use the adapter; those that do keep it until they end."""

    number: int


ToEngine = Submit | Cancel | LoadAdapter | UnloadAdapter


class TokenEvent(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """News of one request. The last event of a request carries a finish_reason."""

    request_id: str
    token_ids: list[int] = []
    logprobs: list[float] | None = None  # one for each token, if asked for
    top_logprobs: list[list[tuple[int, float]]] | None = None  # for each token (id, logprob), best first
    finish_reason: FinishReason | None = None
    error: str = ""  # with finish_reason "error": a sentence for the client
    error_field: str = ""  # the field at fault, if it was the request
    queue_s: float | None = None  # in the first events, with tokens and without: from arrival to the first step
    num_cached_tokens: int = 0  # in the first event: prompt tokens that came from the prefix cache
    prompt_logprobs: list[float] | None = None  # in the first event, if asked for: one per prompt token, NaN first
    # With prompt_logprobs, if asked for: (id, logprob) at the place of each prompt token, best first; [] first.
    prompt_top_logprobs: list[list[tuple[int, float]]] | None = None


class EngineInfo(msgspec.Struct, frozen=True):
    """What the engine turned out to be, for validation, /info and the banner."""

    model_id: str
    backend: str
    backend_version: str
    device: str
    device_kind: str
    device_notes: str
    dtype: str
    vocab_size: int
    max_model_tokens: int
    max_sequences: int
    max_step_tokens: int
    kv_kind: str
    num_blocks: int
    block_tokens: int
    block_bytes: int
    weights_bytes: int
    prefix_cache: bool
    async_depth: int
    mixed: bool
    shape_mode: str
    sampling_features: list[str]  # that a request may use, on the device or on the host
    max_top_logprobs: int  # -1: no limit
    kernels: dict[str, str]
    load_s: float
    max_request_tokens: int  # longest prompt + output that fits the cache
    max_prompt_tokens: int  # longest prompt the device can take in
    memory: list[MemoryRow]  # where the device's memory went, estimated and measured
    prompt_logprobs: bool  # whether a request may ask for them
    prompt_top_logprobs: bool  # ... and for the best at each place
    max_adapters: int = 0  # LoRA adapters at a time
    max_adapter_rank: int = 0
    max_drafts: int = 0  # guessed tokens that a step verifies for a sequence; 0: no speculation


class Ready(msgspec.Struct, tag="ready", frozen=True):
    info: EngineInfo


class Events(msgspec.Struct, tag="events", frozen=True):
    """All news of one step for one connection."""

    events: list[TokenEvent]


class AdapterLoaded(msgspec.Struct, tag="adapter_loaded", frozen=True):
    """The answer to LoadAdapter."""

    number: int
    error: str = ""  # why it is not loaded, for the user


class Stats(msgspec.Struct, tag="stats", frozen=True):
    """Gauges, and counters since the engine started. Sent once a second, also when idle: it is the heartbeat."""

    num_running: int = 0
    num_waiting: int = 0
    blocks_used: int = 0
    blocks_total: int = 0
    requests_finished: int = 0
    requests_preempted: int = 0
    prompt_tokens: int = 0  # of admitted requests
    cached_tokens: int = 0  # of them, found in the prefix cache
    generated_tokens: int = 0
    prefill_steps: int = 0
    decode_steps: int = 0
    step_tokens: int = 0  # computed
    padded_tokens: int = 0  # computed for nothing
    compiled_shapes: int = 0  # during steps; anything but 0 is a gap in the warm-up
    device_s: float = 0.0
    max_batch_tokens: int = 0  # what the running requests may grow to, prompts included
    adapters_loaded: int = 0
    steps_joined: int = 0  # in which new requests joined running ones
    admitted: dict[int, int] = {}  # how often so many requests were taken from the queue at once
    draft_tokens: int = 0  # computed as guesses
    draft_tokens_accepted: int = 0  # of them, that were right
    accepted: dict[int, int] = {}  # how often so many drafts of a row were right, those without drafts among them
    # Of steps, by "prefill" and "decode":
    inference: dict[str, Durations] = {}  # from the launch until the output is read back
    forward: dict[str, Durations] = {}  # as the backend reports it
    commit: dict[str, Durations] = {}  # host work on the output: its tokens go to their sequences
    publish: dict[str, Durations] = {}  # telling the clients


class Fatal(msgspec.Struct, tag="fatal", frozen=True):
    """The engine could not start. `kind` is the exception class, `message` what a user should read."""

    kind: str
    message: str


FromEngine = Ready | Events | AdapterLoaded | Stats | Fatal

_encoder = msgspec.msgpack.Encoder()
to_engine_decoder = msgspec.msgpack.Decoder(ToEngine)
from_engine_decoder = msgspec.msgpack.Decoder(FromEngine)


def frame(message: ToEngine | FromEngine) -> bytes:
    """Encode a message with its length in front."""
    body = _encoder.encode(message)
    return struct.pack("<I", len(body)) + body


class FrameReader:
    """Cuts a byte stream into frames; keeps what is incomplete.

    Raises ValueError for a frame over MAX_FRAME_BYTES: the stream is not ours, close it.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        self._buffer += data
        start = 0
        while len(self._buffer) - start >= 4:
            (length,) = struct.unpack_from("<I", self._buffer, start)
            if length > MAX_FRAME_BYTES:
                raise ValueError(f"frame of {length} bytes, the limit is {MAX_FRAME_BYTES}")
            if len(self._buffer) - start - 4 < length:
                break
            yield bytes(self._buffer[start + 4 : start + 4 + length])
            start += 4 + length
        if start:
            del self._buffer[:start]
