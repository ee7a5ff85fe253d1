"""What `tokenplane serve --env` prints: what a report of a bug should contain."""

from __future__ import annotations

import platform
from importlib import metadata

from tokenplane_core.backend.records import CONTRACT_VERSION

from . import __version__
from .devices import devices_table

PACKAGES = ("torch", "transformers", "tokenizers", "huggingface-hub", "fastapi", "uvicorn", "msgspec", "numpy")


def runtime_environment() -> str:
    """Versions, the platform, and every plugin with its devices."""
    rows = [
        ("Tokenplane", f"{__version__}, contract {CONTRACT_VERSION}"),
        ("Python", platform.python_version()),
        ("Platform", platform.platform()),
        *((name, _version(name)) for name in PACKAGES),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(
        ["Runtime environment:", *(f"{name.ljust(width)}  {said}" for name, said in rows), "", devices_table()]
    )


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"
