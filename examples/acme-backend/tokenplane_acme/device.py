"""Which Acme cards are here, or exactly why not. Standard library only: this runs first."""

from __future__ import annotations

import os

from tokenplane_core.backend.errors import BackendUnavailable
from tokenplane_core.backend.records import DetectReport, Device

MEMORY_BYTES = 4 << 30


def detect() -> DetectReport:
    """ACME_CARDS cards, one if it is not set: a real driver would be asked through /dev and /sys."""
    setting = os.environ.get("ACME_CARDS", "1")
    if not setting.isdigit():
        return DetectReport("broken", reason=f"ACME_CARDS is {setting!r}; set it to the number of cards, or unset it")
    cards = tuple(_card(index) for index in range(int(setting)))
    return DetectReport("found", cards) if cards else DetectReport("absent", reason="ACME_CARDS is 0: no Acme card")


def find(index: int) -> Device:
    """The device of that index; raises BackendUnavailable, with what there is, if there is none."""
    report = detect()
    for card in report.devices:
        if card.index == index:
            return card
    why = report.reason or f"{len(report.devices)} found"
    raise BackendUnavailable(f"acme has no device {index}: {why}")


def _card(index: int) -> Device:
    return Device(
        kind="acme",
        index=index,
        name="Acme card",
        arch="acme-1",
        memory_total_bytes=MEMORY_BYTES,
        dtypes=("float32",),
        score=0,  # imaginary, so never chosen unasked; an accelerator has 100 and more
        notes="imaginary: numpy on the host stands in for it",
        uuid=f"acme-{index:04}",
    )
