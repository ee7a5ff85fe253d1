"""A cache of compiled graphs on disk, for backends whose compiler takes minutes. Knows neither compiler nor device.

An entry is a folder named after the facts it was compiled from. It appears whole or not at all (written beside its
place, then renamed), and is checked whenever it is opened: its files run on the device, so nothing that differs from
what was written is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from .errors import BackendError

MANIFEST = "tokenplane.json"
Facts = Mapping[str, str | int | list[int]]


def cache_folder(backend: str, environ: Mapping[str, str] = os.environ) -> Path:
    """$TOKENPLANE_CACHE/BACKEND, else tokenplane/BACKEND below $XDG_CACHE_HOME or ~/.cache."""
    if own := environ.get("TOKENPLANE_CACHE"):
        return Path(own) / backend
    shared = environ.get("XDG_CACHE_HOME", "")
    # A relative path is to be ignored, says the XDG base directory specification.
    return (Path(shared) if os.path.isabs(shared) else Path.home() / ".cache") / "tokenplane" / backend


def artefact(root: Path, name: str, facts: Facts, build: Callable[[Path], None]) -> Path:
    """The checked folder with the artefact of these facts, called after `name` and them; `build` fills a new one.

    Whatever `build` raises goes through, and leaves nothing behind. If another process was quicker, its folder stands.

    Raises:
        BackendError: the entry cannot be trusted, or the cache cannot be written; names the folder and the reason.
    """
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    folder = root / f"{name}-{digest[:20]}"
    if not folder.exists():
        _make(folder, facts, build)
    if why := _flaw(folder, facts):
        raise BackendError(f"{folder}: {why}. Delete this folder, and the model is compiled again at the next start.")
    return folder


def _make(folder: Path, facts: Facts, build: Callable[[Path], None]) -> None:
    root = folder.parent
    try:
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        part = Path(tempfile.mkdtemp(prefix=".part-", dir=root))
    except OSError as error:
        raise BackendError(
            f"compiled graphs cannot be kept in {root} ({error.strerror}); name a writable folder with TOKENPLANE_CACHE"
        ) from error
    try:
        build(part)
        manifest = {"facts": facts, "files": _digests(part)}
        (part / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        if not folder.exists():
            part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _flaw(folder: Path, facts: Facts) -> str | None:
    """Why this folder is not the artefact of these facts, or None."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        made_from, files = dict(manifest["facts"]), dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} is missing or damaged ({type(error).__name__})"
    for name in sorted({*facts, *made_from}):
        if facts.get(name) != made_from.get(name):
            return f"made for another setting: {name} is {made_from.get(name)!r}, needed is {facts.get(name)!r}"
    found = _digests(folder)
    for name in sorted({*files, *found}):
        if found.get(name) != files.get(name):
            how = "damaged" if name in files and name in found else "missing" if name in files else "not part of it"
            return f"{name} is {how}"
    return None


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file but the manifest, by path below the folder."""
    out = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != MANIFEST:
            with path.open("rb") as file:
                out[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return out
