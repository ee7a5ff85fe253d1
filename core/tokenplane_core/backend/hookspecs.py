"""The hooks a backend plugin implements: methods of the one class that its entry point names.

    [project.entry-points."tokenplane.backends"]
    acme = "tokenplane_acme.plugin:AcmeBackend"

The class says which contract it was written for, as a literal: `contract = "0.2"`. (CONTRACT_VERSION is what the
installed core speaks; it changes without the plugin.) A core serves every plugin of its own major version whose minor
version is not newer than its own, since minor versions only add: optional hooks, arguments that a hook may leave out,
record fields with a default, feature names. It refuses all others by name, before it calls a hook.

The core makes one object of the class per engine process and calls, in this order: `load`, `kv_alloc`, `warmup` (if
there), then `prefill` and `decode` for as long as it serves, then `close`. `detect` is called on an object of its own,
in a child process. Importing the plugin module and making the object must not import the vendor library: that happens
in `load`.

A hook may leave out arguments it does not need. A misspelt hook or argument is refused when the plugin loads.
"""

from __future__ import annotations

import pluggy

from .records import (
    AdapterSpec,
    Capabilities,
    DecodeBatch,
    DetectReport,
    KVLayout,
    LoadOptions,
    ModelSpec,
    PrefillBatch,
    SamplingBatch,
    StepHandle,
)

hookspec = pluggy.HookspecMarker("tokenplane")
hookimpl = pluggy.HookimplMarker("tokenplane")

REQUIRED_HOOKS = ("detect", "load", "kv_alloc", "prefill", "decode")


class BackendHooks:
    """The contract. Five required hooks, then the optional ones."""

    @hookspec(firstresult=True)
    def detect(self) -> DetectReport:  # type: ignore[empty-body]
        """Say which devices are here, or exactly why not.

        Cheap (well under two seconds), standard library only where possible, opens no device context. Run in a
        child process with a time limit, so a crash or a hang inside a driver is an answer too.
        """

    @hookspec(firstresult=True)
    def load(self, model: ModelSpec, options: LoadOptions) -> Capabilities:  # type: ignore[empty-body]
        """Load the weights and return the facts about the loaded model.

        Raises:
            UnsupportedModel: with a sentence a user understands.
            OutOfMemory: the weights do not fit.
        """

    @hookspec(firstresult=True)
    def kv_alloc(self, layout: KVLayout) -> bool:  # type: ignore[empty-body]
        """Allocate the KV cache; return True.

        Raises:
            OutOfMemory: the layout does not fit; the core may ask again with a smaller one.
        """

    @hookspec(firstresult=True)
    def prefill(self, batch: PrefillBatch, sampling: SamplingBatch) -> StepHandle:  # type: ignore[empty-body]
        """Run prompt chunks (and decode rows if `mixed`); sample the rows whose `sample` is set.

        Changes:
            Applies batch.head; writes the KV of the new tokens, and nothing else, into the named blocks or slots.
        Raises:
            DeviceLost: device state unknown. Any other exception counts as that.
        """

    @hookspec(firstresult=True)
    def decode(self, batch: DecodeBatch, sampling: SamplingBatch) -> StepHandle:  # type: ignore[empty-body]
        """Run one token for each row and sample every real row. Otherwise like `prefill`."""

    @hookspec(firstresult=True)
    def warmup(self) -> int:  # type: ignore[empty-body]
        """Optional, after kv_alloc: compile or capture every bucket; return how many.

        Required when shapes.mode is "hard": afterwards no step may compile (StepOutput.compiled stays 0).
        """

    @hookspec(firstresult=True)
    def adapter_load(self, index: int, adapter: AdapterSpec) -> bool:  # type: ignore[empty-body]
        """Load a LoRA adapter under a free index, 1 to AdapterLimits.max_adapters; return True.

        Required, with adapter_drop, when Capabilities.adapters is not None. Called between steps, none of them in
        flight, at any time after kv_alloc. Slots opened with the index from now on are computed with it.

        Raises:
            UnsupportedAdapter: with a sentence a user understands; the index stays free, nothing else is touched.
        """

    @hookspec(firstresult=True)
    def adapter_drop(self, index: int) -> bool:  # type: ignore[empty-body]
        """Forget the adapter of an index; return True. Called between steps, as adapter_load.

        No step to come has a row of a slot that was opened with it.
        """

    @hookspec(firstresult=True)
    def close(self) -> bool:  # type: ignore[empty-body]
        """Optional: give device memory back; return True. May be called twice, and after a failed load."""
