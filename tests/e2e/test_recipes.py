"""The recipes of the documents work, against the demo model as `make serve` starts it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.recipes import DOCS, OF_OTHER_CLIENTS, Recipe, recipes
from helpers.server_process import ServerProcess, server_process

DEMO = Path(__file__).parents[2] / "models" / "demo"
HERE = [recipe for recipe in recipes() if recipe.name not in OF_OTHER_CLIENTS]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with server_process(DEMO, tmp_path_factory.mktemp("demo"), "--backend", "cpu") as running:
        yield running


@pytest.mark.parametrize("recipe", HERE, ids=lambda recipe: recipe.name)
def test_a_recipe_works(recipe: Recipe, server: ServerProcess) -> None:
    recipe.run(server.url)


def test_no_program_in_the_documents_is_left_out() -> None:
    """But for the tutorial for backends, whose excerpts have a test of their own."""
    pages = [page for page in DOCS.glob("*.md") if page.name != "write-a-backend.md"]
    blocks = [block for page in pages for block in re.findall(r"^```(?:python|bash|js)$", page.read_text(), re.M)]
    assert len(blocks) == len(recipes())
    assert len(HERE) == len(blocks) - len(OF_OTHER_CLIENTS)
