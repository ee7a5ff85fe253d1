"""LoRA adapters as an operator names them: TGI's syntax, where they are found, what they may be called."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from tokenplane_core.adapter_files import read_adapter
from tokenplane_core.backend.errors import ConfigError

from .hub import Progress, resolve_adapter

LEAST_RANK = 16
"""There is room for adapters of this rank unless --max-lora-rank says otherwise; most have no more."""
SPARE = 4
"""How many more than those of the start there is room for, where adapters may be loaded later."""
MAX_NAME_CHARS = 256

_ENTRY = re.compile(r"(?P<name>[^=@]+)(?:=(?P<where>[^=@]+))?(?:@(?P<revision>[^=@]+))?")


@dataclass(frozen=True, slots=True)
class AdapterSource:
    """One entry of --lora-adapters. `where`: a folder, or an id on the hub."""

    name: str
    where: str
    revision: str | None

    def __repr__(self) -> str:
        return f"{self.name}={self.where}" + (f"@{self.revision}" if self.revision else "")


def parse_adapters(text: str) -> tuple[AdapterSource, ...]:
    """`id`, `id@revision`, `name=where` and `name=where@revision`, between commas.

    Raises:
        ValueError: an entry is none of these, or a name comes twice.
    """
    found: dict[str, AdapterSource] = {}
    for entry in filter(None, map(str.strip, text.split(","))):
        match = _ENTRY.fullmatch(entry)
        if match is None:
            raise ValueError(f"{entry!r} is none of id, id@revision, name=path, name=id@revision")
        name, where, revision = (part and part.strip() for part in match.group("name", "where", "revision"))
        if name in found:
            raise ValueError(f"the adapter {name!r} is named twice")
        found[name] = AdapterSource(name, where or name, revision)
    return tuple(found.values())


def name_problem(name: str, names_of_model: Collection[str]) -> str | None:
    """Why requests cannot call an adapter so, or None."""
    if name in names_of_model:
        return f"{name!r} is what requests call the model itself"
    if not name or len(name) > MAX_NAME_CHARS or not name.isprintable() or name != name.strip():
        return f"{name[:40]!r} is no name: 1 to {MAX_NAME_CHARS} characters that can be seen"
    return None


@dataclass(frozen=True, slots=True)
class AdapterPlan:
    """What the engine is told: folders by name, and how much room to make."""

    folders: dict[str, str]
    max_adapters: int
    max_rank: int


def plan_adapters(
    sources: Collection[AdapterSource],
    names_of_model: Collection[str],
    *,
    max_adapters: int | None,
    max_rank: int | None,
    may_load_later: bool,
    hub_cache: Path | None,
    progress: Progress,
) -> AdapterPlan:
    """Find the adapters, on the hub if need be, and size the room for them.

    max_adapters and max_rank: None: as many and as large as are named, and some more if more may come later.

    Raises:
        TokenplaneError: an adapter is not to be found, not plain LoRA, larger than there is room, or ill-named.
    """
    folders, ranks = {}, [LEAST_RANK]
    for source in sources:
        if (problem := name_problem(source.name, names_of_model)) is not None:
            raise ConfigError(f"--lora-adapters: {problem}; call the adapter something else, as in name={source.where}")
        folder = resolve_adapter(source.where, source.revision, cache_dir=hub_cache, progress=progress)
        folders[source.name] = str(folder)
        ranks.append(read_adapter(source.name, str(folder)).rank)
    if max_adapters is None:
        max_adapters = len(folders) + (SPARE if may_load_later else 0)
    return AdapterPlan(folders, max_adapters, (max_rank or max(ranks)) if max_adapters else 0)
