"""Runs JavaScript with the npm packages of tests/clients/node, which `make test-clients` installs."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "clients" / "node"


def why_no_node() -> str:
    """Why nothing can be run; "" if it can."""
    if shutil.which("node") is None:
        return "there is no Node on this machine"
    if not (FOLDER / "node_modules").is_dir():
        return "the npm packages are not installed: make test-clients"
    return ""


def run_node(*arguments: str, source: str | None = None, **environment: str) -> str:
    """Run `node ARGUMENTS`, or an ES module given as text; what it printed. AssertionError if it fails."""
    if source is not None:
        arguments = ("--input-type=module", "--eval", source, *arguments)
    done = subprocess.run(
        ["node", *arguments], cwd=FOLDER, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
