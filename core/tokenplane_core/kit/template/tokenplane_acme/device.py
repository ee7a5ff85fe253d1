"""Which Acme cards are here, or exactly why not. Standard library only: this runs first."""

from __future__ import annotations

from tokenplane_core.backend.errors import BackendUnavailable
from tokenplane_core.backend.records import DetectReport, Device

MEMORY_BYTES = 4 << 30
"""What the cache and the weights may take together. Yours: what the driver says the card has."""


def detect() -> DetectReport:
    """The card that numpy stands in for, which is always here.

    Yours: look for your driver's files (/dev, /sys) and answer one of three things.
    found: the devices. absent: DetectReport("absent", reason="no Acme card on the PCI bus").
    broken: DetectReport("broken", reason="...") if the card is there but cannot be used; say what to do about it.
    """
    card = Device(
        kind="acme",
        index=0,
        name="Acme card",
        arch="none",
        memory_total_bytes=MEMORY_BYTES,
        dtypes=("float32",),
        score=0,  # never chosen unasked. Yours: 100 and more for an accelerator
        notes="numpy on the host stands in for it",
    )
    return DetectReport("found", (card,))


def find(index: int) -> Device:
    """The device of that index; raises BackendUnavailable, with what there is, if there is none."""
    report = detect()
    for card in report.devices:
        if card.index == index:
            return card
    why = report.reason or f"{len(report.devices)} found"
    raise BackendUnavailable(f"acme has no device {index}: {why}")
