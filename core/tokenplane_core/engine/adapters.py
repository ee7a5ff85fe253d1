"""Which LoRA adapters the backend holds, and under which index. Knows no weights and no sequences.

Two numbers name an adapter. Its `number` is the client's and never given twice, so that the prefix cache and requests
tell it from a later adapter of the same name. Its `index` is the backend's, and free again once it is dropped.
"""

from __future__ import annotations

import logging
from collections.abc import Container
from dataclasses import dataclass

from ..adapter_files import read_adapter
from ..backend.errors import ConfigError, OutOfMemory, UnsupportedAdapter
from ..backend.plugins import Backend
from ..backend.records import AdapterLimits
from ..messages import LoadAdapter

log = logging.getLogger("tokenplane.engine")

REFUSALS = (UnsupportedAdapter, ConfigError, OutOfMemory)
"""What `Adapters.load` raises; no reason to end the engine."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """A loaded adapter. NO_ADAPTER stands for none."""

    number: int
    name: str
    index: int

    @property
    def salt(self) -> bytes:
        """What the prefix cache puts before the first token of its sequences: they share blocks with no others."""
        return self.number.to_bytes(8, "little") if self.number else b""


NO_ADAPTER = Adapter(0, "", 0)


class Adapters:
    """What is loaded, by number. An adapter that is told to leave stays until no sequence needs it."""

    def __init__(self, backend: Backend, limits: AdapterLimits | None) -> None:
        self._backend = backend
        self._limits = limits
        self._loaded: dict[int, Adapter] = {0: NO_ADAPTER}
        self._free = list(range(limits.max_adapters, 0, -1)) if limits is not None else []
        self.leaving: list[Adapter] = []

    def __len__(self) -> int:
        return len(self._loaded) - 1

    def __getitem__(self, number: int) -> Adapter:
        return self._loaded[number]

    def refusal(self, number: int) -> tuple[str, str] | None:
        """(field, sentence) if no new request may use it."""
        if number not in self._loaded:
            return "adapter", f"no adapter of number {number} is loaded"
        if self._loaded[number] in self.leaving:
            return "adapter", f"the adapter {self._loaded[number].name!r} is being unloaded"
        return None

    def load(self, wanted: LoadAdapter) -> None:
        """Read an adapter and give it to the backend. With no step in flight.

        Raises:
            REFUSALS: with a sentence for the user; nothing has changed.
        """
        if self._limits is None:
            raise ConfigError("there is no room for adapters: --max-loras is 0")
        if not self._free:
            waiting = f", {len(self.leaving)} of them until their last requests end" if self.leaving else ""
            raise ConfigError(
                f"{len(self)} adapters are loaded{waiting}, the limit is {self._limits.max_adapters} (--max-loras);"
                " unload one first"
            )
        spec = read_adapter(wanted.name, wanted.path)
        if spec.rank > self._limits.max_rank:
            raise UnsupportedAdapter(
                f"adapter {spec.name!r} has rank {spec.rank}, the limit is {self._limits.max_rank};"
                f" start with --max-lora-rank {spec.rank}"
            )
        index = self._free[-1]
        try:
            self._backend.adapter_load(index, spec)
        except REFUSALS as error:
            raise type(error)(f"adapter {spec.name!r}: {error}") from error
        self._free.pop()
        self._loaded[wanted.number] = Adapter(wanted.number, wanted.name, index)
        log.info("adapter %s: loaded from %s, rank %d", wanted.name, wanted.path, spec.rank)

    def unload(self, number: int) -> None:
        """No new requests from now on. `drop_unused` lets go of it."""
        adapter = self._loaded.get(number, NO_ADAPTER)
        if adapter is not NO_ADAPTER and adapter not in self.leaving:
            self.leaving.append(adapter)

    def drop_unused(self, in_use: Container[Adapter]) -> None:
        """Let go of what is leaving and nobody uses. With no step in flight."""
        for adapter in [a for a in self.leaving if a not in in_use]:
            self._backend.adapter_drop(adapter.index)
            self.leaving.remove(adapter)
            del self._loaded[adapter.number]
            self._free.append(adapter.index)
            log.info("adapter %s: unloaded", adapter.name)
