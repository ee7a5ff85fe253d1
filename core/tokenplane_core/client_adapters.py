"""The LoRA adapters that an engine should have, seen from the client: which names requests may use, what to load again.

An adapter that is unloaded takes no new requests from then on. Those that run finish with it, also in the next engine
if theirs dies; when the last one has ended, the engine is told to let go of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .backend.errors import ConfigError, EngineFailed, InvalidRequest, UnsupportedAdapter
from .messages import AdapterLoaded, LoadAdapter, ToEngine, UnloadAdapter


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    number: int  # that Submit.adapter names
    name: str
    path: str


class ClientAdapters:
    """What is loaded, by name. `send` gives the engine a message, `in_use` yields the numbers of live requests."""

    def __init__(self, send: Callable[[ToEngine], None], in_use: Callable[[], Iterator[int]]) -> None:
        self._send = send
        self._in_use = in_use
        self._by_name: dict[str, LoadedAdapter] = {}
        self._loading: dict[int, tuple[LoadedAdapter, asyncio.Future[None]]] = {}
        self._numbers: set[int] = {0}  # that new requests may name
        self._last_number = 0
        self.leaving: list[LoadedAdapter] = []

    def __iter__(self) -> Iterator[LoadedAdapter]:
        """Those that new requests may use, oldest first."""
        return iter(list(self._by_name.values()))

    def __len__(self) -> int:
        return len(self._by_name)

    def find(self, name: str) -> LoadedAdapter | None:
        return self._by_name.get(name)

    async def load(self, name: str, path: str) -> LoadedAdapter:
        """Load the adapter in a folder; requests may name it when this returns.

        Raises:
            ConfigError: the name is taken.
            UnsupportedAdapter: the engine's reason.
            EngineFailed: the engine died meanwhile; the adapter will not be loaded again.
        """
        if name in self._by_name or any(name == adapter.name for adapter, _ in self._loading.values()):
            raise ConfigError(f"an adapter named {name!r} is loaded already; unload it first")
        self._last_number += 1
        adapter = LoadedAdapter(self._last_number, name, path)
        answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._loading[adapter.number] = adapter, answered
        self._send(LoadAdapter(adapter.number, name, path))
        await answered
        return adapter

    def unload(self, name: str) -> None:
        """Take it from new requests now, from the engine when its last request has ended. Raises KeyError."""
        adapter = self._by_name.pop(name)
        self._numbers.remove(adapter.number)
        self.leaving.append(adapter)
        self.let_go()

    def let_go(self) -> None:
        """Tell the engine about the leaving adapters that no live request uses any more."""
        in_use = set(self._in_use())
        for adapter in [adapter for adapter in self.leaving if adapter.number not in in_use]:
            self.leaving.remove(adapter)
            self._send(UnloadAdapter(adapter.number))

    def require(self, number: int) -> None:
        """Raises InvalidRequest if no new request may use it."""
        if number not in self._numbers:
            raise InvalidRequest("the adapter it names is not loaded any more", "adapter")

    def answered(self, message: AdapterLoaded) -> None:
        """The engine's answer, to a first loading or to one after a restart."""
        if message.number not in self._loading:
            if message.error:  # a new engine cannot have what the old one had, and refuses those who name it
                self._forget(message.number)
            return
        adapter, answer = self._loading.pop(message.number)
        if not message.error:
            self._by_name[adapter.name] = adapter
            self._numbers.add(adapter.number)
        if answer.done():
            return  # nobody waits any more
        if message.error:
            answer.set_exception(UnsupportedAdapter(message.error))
        else:
            answer.set_result(None)

    def _forget(self, number: int) -> None:
        self._numbers.discard(number)
        self._by_name = {name: a for name, a in self._by_name.items() if a.number != number}
        self.leaving = [adapter for adapter in self.leaving if adapter.number != number]

    def engine_died(self) -> None:
        """Whoever waits for an adapter waits in vain: it may be what killed the engine."""
        for adapter, answer in self._loading.values():
            if not answer.done():
                answer.set_exception(EngineFailed(f"the engine died while it loaded the adapter {adapter.name!r}"))
        self._loading.clear()

    def load_again(self) -> None:
        """Give a new engine what the old one had, before the requests that name it."""
        self.let_go()
        for adapter in [*self._by_name.values(), *self.leaving]:
            self._send(LoadAdapter(adapter.number, adapter.name, adapter.path))
