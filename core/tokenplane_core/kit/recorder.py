"""Collects what became of each law while pytest runs, and says it at the end: on the terminal, and as a report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ..backend.plugins import ask
from .report import LawResult, make_report, verdict, without_paths, write_report


class Recorder:
    """Collects the outcome of every law, backend by backend."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._laws: dict[str, dict[str, LawResult]] = {}
        self._declared: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        said: dict[str, Any] = dict(report.user_properties)
        if "tokenplane-law" not in said:
            return
        backend, law = said["tokenplane-backend"], said["tokenplane-law"]
        if "tokenplane-declared" in said:
            self._declared[backend] = said["tokenplane-declared"]
        if report.when == "call" or not report.passed:  # a law also fails where its subject cannot be made
            result = LawResult(law, report.outcome, round(report.duration, 3), _reason(report))
            self._laws.setdefault(backend, {})[law] = result

    def pytest_sessionfinish(self) -> None:
        file = self._config.getoption("--tokenplane-report")
        folder = self._config.getoption("--tokenplane-model")
        model = Path(folder).resolve().name if folder else "tiny random Llama"
        for name, laws in self._laws.items() if file else ():
            write_report(make_report(ask(name), model, self._declared.get(name, {}), laws.values()), Path(file))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for name, laws in self._laws.items():
            terminalreporter.section(f"tokenplane: {name}")
            for line in verdict(name, laws.values()):
                terminalreporter.line(line)


def _reason(report: pytest.TestReport) -> str:
    """Why a law was skipped or failed, in one line."""
    if report.passed:
        return ""
    if isinstance(report.longrepr, tuple):  # (file, line, reason) of a skip
        return report.longrepr[2].removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    message = crash.message if crash else report.longreprtext.strip()
    return without_paths(message.split("\n")[0])
