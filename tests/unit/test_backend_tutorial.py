"""docs/write-a-backend.md says nothing that the code does not: excerpts, laws, files, options, verdicts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tokenplane_core.backend.hookspecs import BackendHooks
from tokenplane_core.kit.laws import LAWS
from tokenplane_core.kit.report import LEVELS, read_report, verdict

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "write-a-backend.md").read_text()
PACKAGES = (ROOT / "core" / "tokenplane_core" / "kit" / "template", ROOT / "examples" / "acme-backend")
CODE = [file.read_text() for package in PACKAGES for file in package.rglob("*.py")]


@pytest.mark.parametrize("excerpt", re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.S | re.M))
def test_an_excerpt_stands_in_the_template_or_the_example(excerpt: str) -> None:
    assert any(excerpt in code for code in CODE)


def test_every_law_has_a_row_and_every_row_a_law() -> None:
    assert sorted(re.findall(r"^\| `(\w+)` \|", PAGE, flags=re.M)) == sorted(LAWS)


@pytest.mark.parametrize("name", [name for name in vars(BackendHooks) if not name.startswith("_")])
def test_every_hook_is_explained(name: str) -> None:
    assert f"`{name}`" in PAGE


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_is_explained(level: str) -> None:
    assert f"**{level}**" in PAGE


def test_every_file_named_exists() -> None:
    named = set(re.findall(r"`([\w./-]+\.(?:py|md))`", PAGE))
    places = [ROOT, ROOT / "core", *PACKAGES, *(package / "tokenplane_acme" for package in PACKAGES)]
    places.append(ROOT / "core" / "tokenplane_core" / "backend")
    assert len(named) > 8
    assert not [name for name in named if not any((place / name).exists() for place in places)]


def test_the_examples_verdict_is_the_one_of_its_stored_report() -> None:
    report = read_report(ROOT / "docs" / "reports" / "acme.json")
    assert "\n".join(verdict("acme", report.laws)) in PAGE
