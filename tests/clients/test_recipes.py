"""The recipes of the documents for the clients that live here, against the demo model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.node import why_no_node
from helpers.recipes import OF_OTHER_CLIENTS, recipes
from helpers.server_process import ServerProcess, server_process

DEMO = Path(__file__).parents[2] / "models" / "demo"
RECIPES = {recipe.name: recipe for recipe in recipes()}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with server_process(DEMO, tmp_path_factory.mktemp("demo"), "--backend", "cpu") as running:
        yield running


@pytest.mark.parametrize("name", sorted(OF_OTHER_CLIENTS))
def test_a_recipe_works(name: str, demo: ServerProcess) -> None:
    if name == "node" and why_no_node():
        pytest.skip(why_no_node())
    RECIPES[name].run(demo.url)
