"""Progress of a download as lines for a log."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from huggingface_hub import constants, utils

Progress = Callable[[str], None]

PROGRESS_INTERVAL_S = 1.0
"""At most one progress line in this time, and only when the percentage has changed."""


class ProgressLines:
    """Reports how much has arrived in a folder, from a thread of its own, while the `with` block runs.

    It looks at the files because every version of the hub's client writes them alike.
    """

    def __init__(self, folder: Path, total_bytes: int, progress: Progress) -> None:
        self._folder, self._total_bytes, self._progress = folder, total_bytes, progress
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hub-progress", daemon=True)

    def __enter__(self) -> None:
        self._bytes_before = self._bytes_here()
        self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        last_percent = 0
        while not self._done.wait(PROGRESS_INTERVAL_S):
            arrived_bytes = min(max(0, self._bytes_here() - self._bytes_before), self._total_bytes)
            percent = 100 * arrived_bytes // self._total_bytes
            if percent != last_percent:
                self._progress(
                    f"downloaded {format_size(arrived_bytes)} of {format_size(self._total_bytes)} ({percent} %)"
                )
                last_percent = percent

    def _bytes_here(self) -> int:
        total_bytes = 0
        for file in self._folder.glob("*"):
            try:
                total_bytes += file.stat().st_size
            except FileNotFoundError:  # renamed just now: it is complete, and counted the next time
                continue
        return total_bytes


def silence_progress_bars() -> None:
    """Bars are no use in logs; whoever sets HF_HUB_DISABLE_PROGRESS_BARS=0 gets them all the same."""
    if constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
        utils.disable_progress_bars()  # type: ignore[attr-defined]  # documented, but not in an __all__


def format_size(num_bytes: int) -> str:
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.1f} {unit}"
    return f"{num_bytes} bytes"
