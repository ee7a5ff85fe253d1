"""`pytest --tokenplane-backend NAME` runs the conformance laws on an installed backend.

Without file arguments only the laws run; with file arguments they run as well. The model is a tiny random Llama
unless --tokenplane-model names a folder.
"""

from __future__ import annotations

from pathlib import Path

import pytest

SUITE = Path(__file__).with_name("suite.py")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("tokenplane", "Tokenplane backend conformance")
    group.addoption(
        "--tokenplane-backend", action="append", default=[], metavar="NAME", help="backend to test (repeatable)"
    )
    group.addoption(
        "--tokenplane-model", metavar="FOLDER", help="model folder to test with (default: a tiny random Llama)"
    )


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--tokenplane-backend"):
        return
    named = config.args_source is pytest.Config.ArgsSource.ARGS
    config.args = [*(config.args if named else []), str(SUITE)]
