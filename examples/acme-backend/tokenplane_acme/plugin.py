"""The hooks: what Tokenplane's core calls, in the order it calls it. Imports no vendor library before `load`.

What a hook must do: tokenplane_core/backend/hookspecs.py. What its arguments mean: tokenplane_core/backend/records.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenplane_core.backend.hookspecs import hookimpl
from tokenplane_core.backend.records import (
    Bucket,
    Capabilities,
    DecodeBatch,
    DetectReport,
    KVLayout,
    KVSpec,
    Limits,
    LoadOptions,
    ModelSpec,
    PrefillBatch,
    SamplingBatch,
    SamplingCaps,
    ShapePolicy,
    StepHandle,
)

from . import __version__, device

if TYPE_CHECKING:
    from acme_runtime import Card

    from .runner import Runner

BLOCK_TOKENS = 16
MOST_SEQUENCES = 64  # what PIECE in tables.py allows
PREFILL_ROWS = (1, 4)
PREFILL_WIDTHS = (16, 64, 256)


class AcmeBackend:
    contract = "0.2"

    def __init__(self) -> None:
        self._card: Card | None = None
        self._runner: Runner | None = None

    @hookimpl
    def detect(self) -> DetectReport:
        return device.detect()

    @hookimpl
    def load(self, model: ModelSpec, options: LoadOptions) -> Capabilities:
        found = device.find(options.device_index)
        self.close()
        from acme_runtime import Card

        from .loader import check_supported, read_weights
        from .runner import Runner
        from .sampler import FEATURES

        check_supported(model)
        weights = read_weights(model.path)
        self._card = Card(device.MEMORY_BYTES)
        self._runner = Runner(self._card, model, weights)
        max_sequences = max(1, min(options.max_sequences or 16, MOST_SEQUENCES))
        max_step_tokens = max(options.max_step_tokens or 512, max_sequences, PREFILL_WIDTHS[0])
        blocks = -(-model.max_model_tokens // BLOCK_TOKENS)
        self._buckets = buckets(max_sequences, max_step_tokens, blocks)
        reserve_bytes = self._card.free_bytes // 8  # what the programs need while they run
        return Capabilities(
            contract=self.contract,
            backend="acme",
            version=__version__,
            device=found,
            dtype="float32",  # computed in float32, whatever the checkpoint was saved in
            limits=Limits(
                max_sequences=max_sequences,
                max_step_tokens=max(bucket.tokens for bucket in self._buckets),
                max_model_tokens=model.max_model_tokens,
                max_prefill_rows=max(PREFILL_ROWS),
            ),
            kv=KVSpec(
                kind="paged",
                block_tokens=BLOCK_TOKENS,
                block_bytes=2 * 4 * model.num_layers * BLOCK_TOKENS * model.num_kv_heads * model.head_dim,
                budget_bytes=self._card.free_bytes - reserve_bytes,
            ),
            shapes=ShapePolicy("hard", self._buckets, pad_rows=True, context_rule="max_per_row"),
            sampling=SamplingCaps(features=FEATURES, returns_logits=True),
            mixed=False,  # a decode row would be padded to the width of a prompt
            async_depth=1,
            weights_bytes=sum(tensor.nbytes for tensor in weights.values()),
            reserved_bytes={"programs": reserve_bytes},
            kernels={"attention": "paged, in rectangles", "sampling": "acme"},
        )

    @hookimpl
    def kv_alloc(self, layout: KVLayout) -> bool:
        self._loaded.allocate(layout)
        return True

    @hookimpl
    def warmup(self) -> int:
        for bucket in self._buckets:
            self._loaded.compile(bucket)
        return len(self._buckets)

    @hookimpl
    def prefill(self, batch: PrefillBatch, sampling: SamplingBatch) -> StepHandle:
        return self._loaded.launch(batch, sampling)

    @hookimpl
    def decode(self, batch: DecodeBatch, sampling: SamplingBatch) -> StepHandle:
        return self._loaded.launch(batch, sampling)

    @hookimpl
    def close(self) -> bool:
        if self._card is not None:
            self._card.close()
        self._card = self._runner = None
        return True

    @property
    def _loaded(self) -> Runner:
        assert self._runner is not None, "load comes first"
        return self._runner


def buckets(max_sequences: int, max_step_tokens: int, max_blocks: int) -> tuple[Bucket, ...]:
    """The shapes to compile: few, since each takes time at start, and near to what batches are like."""
    contexts = sorted({-(-max_blocks // 4), max_blocks})
    decode = [rows for rows in (1, 4, 16) if rows < max_sequences] + [max_sequences]
    prefill = [(rows, rows * width) for rows in PREFILL_ROWS for width in PREFILL_WIDTHS]
    return (
        *(Bucket("decode", rows, rows, context) for rows in decode for context in contexts),
        *(
            Bucket("prefill", rows, tokens, context)
            for rows, tokens in prefill
            for context in contexts
            if tokens <= max_step_tokens
        ),
    )
