"""What the scripts that write pages in docs/ share: tables, and writing or checking."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Lines of a Markdown table, and an empty one."""
    yield f"| {' | '.join(head)} |"
    yield f"|{' --- |' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"
    yield ""


def write_or_check(name: str, text: str) -> None:
    """Write the page docs/`name`; with --check on the command line, end with an error if it is not this text."""
    page = DOCS / name
    match sys.argv[1:]:
        case []:
            page.write_text(text)
        case ["--check"]:
            if not page.exists() or page.read_text() != text:
                raise SystemExit(f"docs/{name} is not what its sources make; run: make pages")
        case others:
            raise SystemExit(f"unknown option {' '.join(others)}; there is --check")
