"""What crosses between the core and a backend plugin.

Plain frozen records of ints, strings and numpy arrays: no tensors, no request objects, no configuration. The
core reads facts (`Device`, `Capabilities`) and hands over work (`PrefillBatch`, `DecodeBatch`); a plugin never
sees the scheduler, the scheduler never sees a device.

Rules that hold for every array in this file:

* It is C-contiguous, and the dtype stands in the comment behind the field.
* The core makes fresh arrays for each step and does not write to them after the call: a plugin may keep or
  upload them when it likes, and must not write to them.
* A field named `*_starts` has one more entry than there are rows: row i owns the half-open range
  `[starts[i], starts[i + 1])`.
* Lengths and positions count tokens. Positions are absolute: the first prompt token has position 0.

A field arrives with the feature that needs it, together with a law in the conformance kit that proves it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

I32 = NDArray[np.int32]
I64 = NDArray[np.int64]
F32 = NDArray[np.float32]
U32 = NDArray[np.uint32]
U64 = NDArray[np.uint64]
Bool = NDArray[np.bool_]

CONTRACT_VERSION = "0.2"
"""major.minor. Minor versions only add optional fields, hooks and feature names."""

PAD_BLOCK = 0
"""Block id that is never given to a sequence: padding rows read and write here, unused table entries name it."""

TOKEN_ON_DEVICE = -1
"""In `token_ids`: the token most recently sampled for this row's slot, which the host has not read back yet.
Only sent to plugins that declare `async_depth >= 1`."""


# --- What is here: detect() ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Offer:
    """What a backend will do on a device unless told otherwise: facts for the memory plan before a model is loaded.

    Afterwards Capabilities counts.
    """

    max_sequences: int = 64
    max_step_tokens: int = 2048
    headroom_bytes: int = 0  # kept free for the driver, libraries, the allocator's slack
    decode_graphs: int | None = 0  # decode steps captured as graphs; None: compiled programs of unknown size
    quantizes: tuple[str, ...] = ()  # values of ModelSpec.quantize it knows
    kv_dtypes: tuple[str, ...] = ()  # values of ModelSpec.kv_dtype it knows


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator, as `detect` found it.

    `score` orders unlike backends when the user names none: the highest wins, 0 is never chosen unasked (the
    simulated devices), the CPU has 1, accelerators 100 and more.
    """

    kind: str  # cpu cuda rocm xpu tpu gaudi neuron ... simulated
    index: int
    name: str  # what the vendor calls it
    arch: str  # sm_90, gfx942, avx512_bf16+amx ...
    memory_total_bytes: int  # what a process may use: a cgroup limit counts
    dtypes: tuple[str, ...]  # that the device computes in, preferred first
    score: int
    memory_free_bytes: int | None = None
    notes: str = ""  # one line a person wants to read: cores allowed, driver, ...
    uuid: str = ""  # what the vendor's own tools call this one card
    state: Literal["ok", "busy", "broken"] = "ok"  # busy and broken are never chosen unasked; notes say why
    offer: Offer = field(default_factory=Offer)


@dataclass(frozen=True, slots=True)
class DetectReport:
    """The answer of `detect`.

    found: `devices` is not empty. absent: no such hardware, which is normal. broken: the hardware (or a trace
    of it) is there but cannot be used; `reason` says why and what to do.
    """

    status: Literal["found", "absent", "broken"]
    devices: tuple[Device, ...] = ()
    reason: str = ""


# --- What to run: load() ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model on local disk, described by plain values read from its config.json.

    `config` is the parsed file itself, for what only some architectures have.
    """

    model_id: str  # what the user asked for
    path: str  # folder with config.json and *.safetensors
    revision: str | None
    architecture: str  # config.json "architectures"[0], or "" if it names none
    config: Mapping[str, Any]
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int  # rows of the output layer; token ids are below it
    max_model_tokens: int  # longest sequence (prompt + output) this deployment serves
    dtype: str  # float32 bfloat16 float16
    trust_remote_code: bool = False
    # Linear weights are quantized while they load, to "int8" or "int4"; None: they stay as they are stored. Only what
    # Offer.quantizes names.
    quantize: str | None = None
    # The KV cache is kept in "int8", with a scale for each token and head; None: in `dtype`. Only what Offer.kv_dtypes
    # names.
    kv_dtype: str | None = None


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """A LoRA adapter on local disk, as the peft library writes one.

    `config` is its adapter_config.json. The core has looked at it: plain LoRA of linear layers, of a rank within
    AdapterLimits.max_rank. What the file of weights holds, nobody has seen yet.
    """

    name: str  # what requests call it
    path: str  # folder with adapter_config.json and adapter_model.safetensors
    rank: int  # the largest of its layers
    config: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How to load, apart from which model. Nothing here changes what a token means."""

    device_index: int = 0
    num_threads: int | None = None  # host threads the backend may compute with; None: decide yourself
    max_step_tokens: int | None = None  # the user's wish for Limits.max_step_tokens; a plugin may offer less
    max_sequences: int | None = None  # the user's wish for Limits.max_sequences; a plugin may offer less
    graph_rows: tuple[int, ...] | None = None  # the user's wish for the rows of "soft" decode buckets; (): capture none
    max_adapters: int = 0  # LoRA adapters to make room for; 0: there will be none, and the model stays as it is
    max_adapter_rank: int = 0  # of the largest of them
    max_drafts: int = 0  # most draft tokens that a row will bring, see PrefillBatch.num_drafts; 0: there will be none
    own_process: bool = False  # nothing but serving happens in this one: what only loading takes may be had in another


# --- What the loaded model can do: Capabilities -------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Bucket:
    """A shape the device has compiled, or captured a graph for. Padding up to it is the core's work."""

    phase: Literal["prefill", "decode"]
    rows: int
    tokens: int  # over all rows, after padding; in a decode bucket equal to rows
    context_blocks: int = 0  # what ShapePolicy.context_rule counts; 0 if the rule is "none"


@dataclass(frozen=True, slots=True)
class ShapePolicy:
    """Which batch shapes the device runs.

    mode "ragged": any. "soft": any, but shapes in `buckets` are cheaper. "hard": only those in `buckets`.
    pad_rows: prefill rows are each right-padded to bucket.tokens / bucket.rows (a rectangle); otherwise rows lie
    back to back and only the end of the batch is padded.
    context_rule: "none"; "max_per_row": bucket.context_blocks bounds the blocks of the longest row; "total": it
    bounds the sum over rows. Blocks are counted after the step's new tokens.
    """

    mode: Literal["ragged", "soft", "hard"] = "ragged"
    buckets: tuple[Bucket, ...] = ()
    pad_rows: bool = False
    context_rule: Literal["none", "max_per_row", "total"] = "none"


@dataclass(frozen=True, slots=True)
class Limits:
    """Hard limits of the loaded model on this device. The core refuses or waits; it never proposes more."""

    max_sequences: int  # slots: sequences alive on the device at once, also the most rows of a batch
    max_step_tokens: int  # padded tokens in one call
    max_model_tokens: int  # longest sequence
    max_prefill_rows: int  # prompts in one prefill call
    chunk_tokens: int = 1  # a non-final prompt chunk is a multiple of this; 0: a prompt cannot be split
    max_table_entries: int | None = None  # rows x blocks per row in one batch (a TPU's scalar memory)


@dataclass(frozen=True, slots=True)
class KVSpec:
    """How the device addresses the KV cache.

    paged: the core hands out blocks and sends block tables. slot: each sequence owns one line of
    max_model_tokens, addressed by its slot id; no tables, no sharing.
    """

    kind: Literal["paged", "slot"]
    block_tokens: int  # paged: tokens in a block. slot: max_model_tokens
    block_bytes: int  # memory of one block (slot: of one line) over all layers, K and V
    budget_bytes: int  # what the plugin measured to be free for the cache after loading


SAMPLING_FEATURES = frozenset(
    {
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "typical_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "logit_bias",
        "logprobs",
        "processed_logprobs",
        "mask",
    }
)
"""Every name SamplingCaps.features may hold. Greedy needs no name: every backend can take an argmax."""

_UNCLAIMED = frozenset({"mask"})
"""Features younger than contract 0.1: who leaves SamplingCaps.features at its default may have been written before."""


@dataclass(frozen=True, slots=True)
class SamplingCaps:
    """What the device samples itself. For the rest the core asks for logits and samples on the host."""

    features: frozenset[str] = SAMPLING_FEATURES - _UNCLAIMED
    max_top_k: int | None = None  # None: up to the vocabulary
    max_top_logprobs: int | None = None
    returns_logits: bool = True  # False: what the device cannot do is refused at the door


@dataclass(frozen=True, slots=True)
class AdapterLimits:
    """How many LoRA adapters there is room for. Their indices are 1 to max_adapters."""

    max_adapters: int
    max_rank: int


@dataclass(frozen=True, slots=True)
class Capabilities:
    """The facts about a loaded model on a device. `load` returns it once; it never changes afterwards."""

    contract: str  # the CONTRACT_VERSION the plugin was written for
    backend: str  # entry-point name
    version: str  # of the plugin's distribution
    device: Device
    dtype: str
    limits: Limits
    kv: KVSpec
    shapes: ShapePolicy = field(default_factory=ShapePolicy)
    sampling: SamplingCaps = field(default_factory=SamplingCaps)
    mixed: bool = False  # a prefill call may carry decode rows
    async_depth: int = 0  # steps the device accepts before the host has read the previous one
    weights_bytes: int = 0
    reserved_bytes: Mapping[str, int] = field(default_factory=dict)  # set aside besides weights and cache, by piece
    kernels: Mapping[str, str] = field(default_factory=dict)  # piece -> which implementation and why
    prompt_logprobs: bool = False  # False: PrefillBatch.next_token_ids never comes, who asks is refused at the door
    prompt_top_logprobs: bool = False  # False: PrefillBatch.num_prompt_top_logprobs is always 0
    adapters: AdapterLimits | None = None  # None: no adapter_load comes, and SlotOpen.adapter is always 0
    # Most draft tokens of a row: LoadOptions.max_drafts where the plugin can verify drafts, which takes `mixed`. 0:
    # PrefillBatch.num_drafts never comes. A batch draws at most limits.max_sequences + max_drafts tokens, so memory for
    # logits does not grow with rows times drafts.
    max_drafts: int = 0


@dataclass(frozen=True, slots=True)
class KVLayout:
    """The cache the core asks for. The plugin owns memory and strides.

    Paged: block ids 0 .. num_blocks - 1, where PAD_BLOCK is the plugin's to scribble on. Slots are
    0 .. num_slots - 1 for sequences; slot `num_slots` belongs to padding rows.
    """

    num_blocks: int
    block_tokens: int
    num_slots: int
    max_blocks_per_sequence: int

    @property
    def pad_slot(self) -> int:
        return self.num_slots


# --- One step: prefill() and decode() -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SlotOpen:
    """A sequence begins to live in a slot: forget whatever the slot held.

    What a slot's tokens are, a plugin knows without being told again: the cached ones from here, all later ones
    because they pass through prefill and decode before anything after them is drawn. Penalties count those.
    """

    slot: int
    num_prompt_tokens: int  # tokens from this position on count as generated
    cached_token_ids: I32  # i32 [cached] tokens already in the blocks of its table: a prefix hit
    adapter: int = 0  # index of the LoRA adapter that all its tokens are computed with; 0: none


@dataclass(frozen=True, slots=True)
class StepHead:
    """Changes to the plugin's slot state, applied before the batch in the order closed, opened, table.

    Block tables travel as deltas: table[table_slots[j], table_positions[j]] = table_blocks[j]. Entries of a newly
    opened slot start as PAD_BLOCK.
    """

    step: int  # strictly increasing over prefill and decode calls together
    closed: I32  # i32 [c] slots whose sequence has left
    opened: tuple[SlotOpen, ...]
    table_slots: I32  # i32 [d]
    table_positions: I32  # i32 [d] which block of the sequence
    table_blocks: I32  # i32 [d] block id


@dataclass(frozen=True, slots=True)
class PrefillBatch:
    """Prompt chunks, flat. With `Capabilities.mixed` also decode rows (one new token, sampled), even alone.

    Row i computes the `num_new_tokens[i]` tokens token_ids[row_starts[i] : row_starts[i] + num_new_tokens[i]] at
    positions context_lens[i] and up. What lies between a row's tokens and the next row's start is padding. Rows
    from num_rows on are padding rows: pad slot, no tokens.
    """

    head: StepHead
    num_rows: int  # real rows; arrays may be longer
    slots: I32  # i32 [rows]
    row_starts: I32  # i32 [rows + 1]
    num_new_tokens: I32  # i32 [rows]
    context_lens: I32  # i32 [rows] tokens in the cache before this step
    token_ids: I32  # i32 [row_starts[-1]], TOKEN_ON_DEVICE allowed in decode rows
    sample: Bool  # bool [rows] True: draw a token after the row's last token
    bucket: Bucket | None
    # i32 [row_starts[-1]] the prompt token that follows a token, where its log-probability is wanted, else -1.
    # None: nowhere.
    next_token_ids: I32 | None = None
    num_prompt_top_logprobs: int = 0  # wherever next_token_ids wants one: also of the k best ids
    # i32 [rows] the last n tokens of a row are drafts: guesses of what will be drawn. Draw after each of them, and
    # after the token before them; such a row has 1 + n tokens, all known to the host, and `sample` is True. What wrong
    # guesses leave in the cache and among the slot's tokens, later steps overwrite at the same positions: address both
    # by position. None: no row has drafts.
    num_drafts: I32 | None = None


@dataclass(frozen=True, slots=True)
class DecodeBatch:
    """One token for each row; every real row is sampled. Rows from num_rows on are padding rows (pad slot)."""

    head: StepHead
    num_rows: int
    slots: I32  # i32 [rows]
    token_ids: I32  # i32 [rows], TOKEN_ON_DEVICE allowed
    context_lens: I32  # i32 [rows] tokens in the cache before this step
    bucket: Bucket | None


@dataclass(frozen=True, slots=True)
class TokenMask:
    """Which ids some rows of a SamplingBatch may draw, as a grammar demands.

    `words()` builds the mask on the host when it is first called, and gives the same array each time. Call it after the
    step's forward pass is launched: then the device computes meanwhile.
    """

    rows: I32  # i32 [m] entries of the SamplingBatch, rising; all others may draw any id
    words: Callable[[], U32]  # u32 [m, ceil(vocab / 32)] bit t % 32 of word t // 32 is 1: id t is allowed; one at least


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """How to draw, one entry per token to draw, in batch order: one for a sampled row, 1 + n for a row with n drafts,
    each with its own position (padding rows have none).

    The meaning of each field, the order they apply in and the law for the random draw are in `sampling.py`, with
    the reference implementation. `features` names what this batch uses, so that a plugin can skip the rest.
    """

    features: frozenset[str]  # subset of SAMPLING_FEATURES that at least one row uses
    temperature: F32  # f32 [n] 0: greedy
    top_k: I32  # i32 [n] 0: off
    top_p: F32  # f32 [n] 1: off
    min_p: F32  # f32 [n] 0: off
    typical_p: F32  # f32 [n] 1: off
    repetition_penalty: F32  # f32 [n] 1: off
    presence_penalty: F32  # f32 [n] 0: off
    frequency_penalty: F32  # f32 [n] 0: off
    seeds: U64  # u64 [n]
    positions: I64  # i64 [n] absolute position of the token being drawn
    bias_starts: I32  # i32 [n + 1]
    bias_ids: I32  # i32 [b] ids with a logit bias
    bias_values: F32  # f32 [b] -inf bans the id
    num_logprobs: I32  # i32 [n] -1: none; 0: of the drawn token; k: also of the k best
    processed_logprobs: Bool  # bool [n] True: of the distribution drawn from; False: of the raw logits
    return_logits: bool = False  # draw nothing, return the raw logits: the core samples on the host
    mask: TokenMask | None = None  # "mask" is then in features

    def __len__(self) -> int:
        return len(self.temperature)


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a step produced, rows as the entries of SamplingBatch."""

    step: int
    token_ids: I32  # i32 [n]; [0] when logits were asked for
    logprobs: F32 | None = None  # f32 [n], NaN where the row asked for none
    top_ids: I32 | None = None  # i32 [n, k], k the largest num_logprobs of the batch; sorted, best first
    top_logprobs: F32 | None = None  # f32 [n, k]
    logits: F32 | None = None  # f32 [n, vocab] raw
    device_s: float = 0.0  # seconds the device was busy with this step
    compiled: int = 0  # shapes compiled during the step; 0 after warm-up
    prompt_logprobs: F32 | None = None  # f32 [p] by the raw logits, one for each next_token_ids >= 0, in their order
    prompt_top_ids: I32 | None = None  # i32 [p, k], k num_prompt_top_logprobs of the batch; sorted, best first
    prompt_top_logprobs: F32 | None = None  # f32 [p, k]


class StepHandle(Protocol):
    """A launched step. Handles complete in the order they were launched."""

    def done(self) -> bool:
        """True when `result` returns without waiting."""
        ...

    def result(self) -> StepOutput:
        """Wait for the step and return its output.

        Raises:
            DeviceLost: the device is gone; nothing of this plugin object may be used again.
        """
        ...


@dataclass(frozen=True, slots=True)
class FinishedStep:
    """The handle of a plugin that computes inside the call (async_depth 0)."""

    output: StepOutput

    def done(self) -> bool:
        return True

    def result(self) -> StepOutput:
        return self.output
