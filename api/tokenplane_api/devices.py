"""What `tokenplane devices` prints: every installed backend plugin and its answer."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import msgspec

from tokenplane_core.backend.plugins import PluginAnswer, survey
from tokenplane_core.backend.records import Device

SIMULATED = "simulated"
"""Device kind of the devices that only exist for tests."""


def devices_json() -> str:
    answers = [
        {
            "backend": a.name,
            "distribution": a.distribution,
            "version": a.version,
            "contract": a.contract,
            "status": a.report.status,
            "reason": a.report.reason,
            "devices": a.report.devices,
            "elapsed_s": round(a.elapsed_s, 3),
        }
        for a in survey()
    ]
    return msgspec.json.format(msgspec.json.encode({"backends": answers}), indent=2).decode()


def devices_table() -> str:
    return format_table(survey())


def format_table(answers: Sequence[PluginAnswer]) -> str:
    """One row for each plugin, what it found or why not below it; simulated devices in a last line."""
    real = [answer for answer in answers if not _is_simulated(answer)]
    simulated = [answer.name for answer in answers if _is_simulated(answer)]
    if real:
        rows = [("BACKEND", "VERSION", "CONTRACT", "STATUS")]
        rows += [(a.name, a.version or "?", a.contract or "?", a.report.status) for a in real]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        head, *body = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
        lines = [head]
        for row, answer in zip(body, real, strict=True):
            lines += [row, *_details(answer)]
    else:
        lines = ['No backend plugin is installed. For this machine\'s CPU: pip install "tokenplane[cpu]"']
    if simulated:
        lines += ["", f"Simulated devices, used only when named with --backend: {', '.join(simulated)}"]
    return "\n".join(lines)


def _is_simulated(answer: PluginAnswer) -> bool:
    found = answer.report.devices
    return bool(found) and all(device.kind == SIMULATED for device in found)


def _details(answer: PluginAnswer) -> list[str]:
    lines = [f"  {device.index}: {_describe(device)}" for device in answer.report.devices]
    if answer.report.reason:
        lines += textwrap.wrap(answer.report.reason, 110, initial_indent="  ", subsequent_indent="  ")
    return lines


def _describe(device: Device) -> str:
    memory = f"{device.memory_total_bytes / 2**30:.1f} GiB"
    if device.memory_free_bytes is not None:
        memory += f" ({device.memory_free_bytes / 2**30:.1f} free)"
    parts = [device.name, device.arch, memory, "/".join(device.dtypes), device.notes]
    return ", ".join(part for part in parts if part)
