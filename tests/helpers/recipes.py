"""The recipes of docs/: fenced blocks under a comment `<!-- recipe: NAME; shows REGEX -->`, run as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from helpers.node import run_node

DOCS = Path(__file__).parents[2] / "docs"
SERVER = "http://127.0.0.1:8080"
"""What the recipes call it."""

OF_OTHER_CLIENTS = {"node", "langchain", "litellm"}
"""Recipes that tests/clients runs, where these are installed."""

_BLOCK = re.compile(r"<!-- recipe: ([\w ]+?)(?:; shows (.+?))? -->\n```(\w+)\n(.*?)```", re.DOTALL)


@dataclass(frozen=True)
class Recipe:
    """shows: a regular expression that must be found in what the recipe prints."""

    name: str
    language: str
    code: str
    shows: str

    def run(self, url: str) -> None:
        """Run it against the server at url; assert that it works and prints what it should."""
        code = self.code.replace(SERVER, url)
        printed = run_node(source=code) if self.language == "js" else _run(self.language, code)
        assert re.search(self.shows, printed), printed


def _run(language: str, code: str) -> str:
    program = {"bash": "bash", "python": sys.executable}[language]
    done = subprocess.run([program, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def recipes() -> list[Recipe]:
    found = [
        Recipe(name, language, code, shows or r"\w{3}")
        for page in sorted(DOCS.glob("*.md"))
        for name, shows, language, code in _BLOCK.findall(page.read_text())
    ]
    assert len({recipe.name for recipe in found}) == len(found), "two recipes have the same name"
    return found
