"""The papers name files and functions that exist."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "scripts").glob("*_page.py"))
PAPERS = ("ARCHITECTURE.md", "README.md", "CONTRIBUTING.md")
PATH = r"`((?:[\w.-]+/)+[\w.-]*|[\w-]+\.(?:md|toml|txt)|Makefile)`"


@cache
def definitions(path: Path) -> frozenset[str]:
    """Names of a module's classes, functions and methods, the latter as Class.method."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef):
            names |= {
                f"{node.name}.{item.name}"
                for item in node.body
                if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef)
            }
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
            names |= {
                inner.name for inner in ast.walk(node) if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef)
            }
    return frozenset(names)


@pytest.mark.parametrize("paper", PAPERS)
def test_every_path_named_exists(paper: str) -> None:
    text = re.sub(r"```.*?```", "", (ROOT / paper).read_text(), flags=re.S)
    paths = set(re.findall(PATH, text))
    assert paths, f"{paper} names no file"
    missing = sorted(
        path for path in paths if not (ROOT / path.rstrip("/")).exists() and not path.startswith("backend/")
    )
    assert not missing


def test_every_function_named_in_the_walk_exists() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    pairs = re.findall(r"`([\w/.]+\.py)`\s+`([\w.]+)`", text)
    assert len(pairs) > 15
    missing = [f"{path} {name}" for path, name in pairs if name not in definitions(ROOT / path)]
    assert not missing


def test_the_file_tree_of_the_readme_is_true() -> None:
    text = (ROOT / "README.md").read_text()
    (tree,) = re.findall(r"```tree\n(.*?)```", text, flags=re.S)
    stack: list[str] = []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        names = line.split("  ")[depth].split() if line.strip() else []
        for name in names[:1]:
            stack = [*stack[:depth], name.rstrip("/")]
            assert (ROOT / "/".join(stack)).exists(), f"README's tree names {'/'.join(stack)}"


def test_every_error_class_is_in_the_tree_of_its_docstring() -> None:
    source = (ROOT / "core/tokenplane_core/backend/errors.py").read_text()
    module = ast.parse(source)
    docstring = ast.get_docstring(module) or ""
    for node in module.body:
        if isinstance(node, ast.ClassDef):
            assert re.search(rf"\b{node.name}\b", docstring), f"{node.name} is not in the tree"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_page_that_a_script_writes_is_what_its_sources_make(script: Path) -> None:
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
