"""`tokenplane new-backend NAME`: a vendor's package, complete, at the simplest level of the conformance kit.

The template in the core's kit is itself a working package, for cards called "acme": writing one for another name is
replacing that word.
"""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import re
from importlib.resources.abc import Traversable
from pathlib import Path

from tokenplane_core.backend.errors import ConfigError
from tokenplane_core.backend.plugins import installed

MAX_NAME_LENGTH = 20
OURS = frozenset({"core", "api", "torch", "cpu", "cuda", "rocm", "xpu", "tpu", "gaudi", "neuron"})
"""What follows `tokenplane-` in the project's own distributions, installed or not."""


def new_backend(name: str, folder: Path) -> Path:
    """Write the package for backend `name` to `folder`/`name`-backend; returns that folder.

    Raises:
        ConfigError: the name or the folder cannot be used; nothing is written.
    """
    check_name(name)
    target = folder / f"{name}-backend"
    if target.exists():
        raise ConfigError(f"{target} exists already; choose another --path, or another name")
    template = importlib.resources.files("tokenplane_core.kit") / "template"
    try:
        _copy(template, target, name)
    except OSError as error:
        raise ConfigError(f"{target} cannot be written: {error}") from error
    return target


def check_name(name: str) -> None:
    """Raise ConfigError, saying what would do, unless a new backend may be called `name`."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or len(name) > MAX_NAME_LENGTH:
        raise ConfigError(
            f"a backend cannot be called {name!r}: small letters, digits and underscores, a letter first,"
            f" at most {MAX_NAME_LENGTH} of them"
        )
    if name in OURS:
        raise ConfigError(f"tokenplane-{name} is a distribution of Tokenplane itself; choose another name")
    if name in installed():
        raise ConfigError(f"a backend called {name!r} is installed already; uninstall it, or choose another name")
    try:
        version = importlib.metadata.version(f"tokenplane-{name}")
    except importlib.metadata.PackageNotFoundError:
        return
    raise ConfigError(f"tokenplane-{name} {version} is installed already, as something else; choose another name")


def renamed(text: str, name: str) -> str:
    """The template's text for another card: acme -> my_card, Acme -> MyCard."""
    return text.replace("acme", name).replace("Acme", name.title().replace("_", ""))


def _copy(source: Traversable, target: Path, name: str) -> None:
    if source.is_file():
        target.write_text(renamed(source.read_text(encoding="utf-8"), name), encoding="utf-8")
        return
    target.mkdir(parents=True)
    for entry in source.iterdir():
        if entry.name != "__pycache__":
            _copy(entry, target / renamed(entry.name, name), name)
