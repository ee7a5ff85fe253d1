"""`pytest --tokenplane-backend NAME` runs the conformance laws on an installed backend and says which level it reached.

Without file arguments only the laws run; with file arguments they run as well. The model is a tiny random Llama
unless --tokenplane-model names a folder. --tokenplane-report writes the verdict as JSON (report.py).
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
    group.addoption("--tokenplane-report", metavar="FILE", help="write the verdict on the one backend tested, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    backends, report = config.getoption("--tokenplane-backend"), config.getoption("--tokenplane-report")
    if report and len(backends) != 1:
        raise pytest.UsageError(
            f"--tokenplane-report holds one backend; --tokenplane-backend names {len(backends) or 'none'}"
        )
    if not backends:
        return
    named = config.args_source is pytest.Config.ArgsSource.ARGS
    config.args = [*(config.args if named else []), str(SUITE)]
    if not hasattr(config, "workerinput"):  # a worker of pytest-xdist; only its parent sees all laws
        # Imported late: pytest loads this module in every project of an environment that has the kit.
        from .recorder import Recorder

        config.pluginmanager.register(Recorder(config), "tokenplane-recorder")


def pytest_itemcollected(item: pytest.Item) -> None:
    """Note in words what a law test is about, so that its outcome can be read wherever it is reported."""
    params = getattr(getattr(item, "callspec", None), "params", {})
    if {"backend_name", "law_name"} <= params.keys():
        item.user_properties += [("tokenplane-backend", params["backend_name"]), ("tokenplane-law", params["law_name"])]
