"""What `tokenplane devices` prints: every plugin's answer, hardware without a plugin, and the default."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Sequence
from typing import Any

import msgspec

from tokenplane_core.backend.choice import best, choose_device, missing_hardware
from tokenplane_core.backend.errors import TokenplaneError
from tokenplane_core.backend.hardware import Hardware
from tokenplane_core.backend.plugins import PluginAnswer, survey
from tokenplane_core.backend.probe import GIB, join_notes
from tokenplane_core.backend.records import Device
from tokenplane_core.memory import SIMULATED

WIDTH = 110


def devices_json() -> str:
    answers = survey()
    report = json_report(answers, missing_hardware(answers))
    return msgspec.json.format(msgspec.json.encode(report), indent=2).decode()


def devices_table() -> str:
    answers = survey()
    return format_table(answers, missing_hardware(answers))


def json_report(answers: Sequence[PluginAnswer], missing: Sequence[Hardware]) -> dict[str, Any]:
    """backends: each plugin's answer. missing: hardware without one. default: what `serve` takes if told nothing."""
    return {
        "backends": [
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
            for a in answers
        ],
        "missing": [
            {"backend": h.backend, "hardware": h.what, "accelerator": h.is_accelerator, "install": h.install}
            for h in missing
        ],
        "default": _default(answers, missing),
    }


def _default(answers: Sequence[PluginAnswer], missing: Sequence[Hardware]) -> dict[str, Any]:
    try:
        answer = best(answers, missing)
        device, why = choose_device(answer)
    except TokenplaneError as error:
        return {"backend": None, "device_index": None, "reason": str(error)}
    return {"backend": answer.name, "device_index": device.index, "reason": why}


def format_table(answers: Sequence[PluginAnswer], missing: Sequence[Hardware] = ()) -> str:
    """One row for each plugin, what it found or why not below it; then what is missing, the default, the simulated."""
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
    if missing:
        lines += ["", "Hardware without a plugin:", *(f"  {h.what}: {h.install}" for h in missing)]
    if real:
        lines += ["", *_default_lines(_default(answers, missing))]
    if simulated:
        lines += ["", f"Simulated devices, used only when named with --backend: {', '.join(simulated)}"]
    return "\n".join(lines)


def _is_simulated(answer: PluginAnswer) -> bool:
    found = answer.report.devices
    return bool(found) and all(device.kind == SIMULATED for device in found)


def _default_lines(default: dict[str, Any]) -> list[str]:
    if default["backend"] is None:
        first, *rest = str(default["reason"]).splitlines()
        lines = _wrapped(f"`tokenplane serve` without --backend refuses to start: {first}", "")
        return lines + [part for line in rest for part in _wrapped(line, "    ")]
    chosen = f"{default['backend']} device {default['device_index']}"
    return _wrapped(f"`tokenplane serve` without --backend takes {chosen} ({default['reason']}).", "")


def _details(answer: PluginAnswer) -> list[str]:
    """A line for each device, or for several in a row of which it says the same; then the reason."""
    lines = []
    for text, group in itertools.groupby(answer.report.devices, _describe):
        indices = [device.index for device in group]
        in_a_row = len(indices) > 1 and indices[-1] - indices[0] == len(indices) - 1
        numbers = f"{indices[0]}-{indices[-1]}" if in_a_row else ", ".join(map(str, indices))
        lines += _wrapped(f"  {numbers}: {text}", "     ")
    if answer.report.reason:
        lines += _wrapped(f"  {answer.report.reason}", "  ")
    return lines


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False)


def _describe(device: Device) -> str:
    memory = f"{device.memory_total_bytes / GIB:.1f} GiB" if device.memory_total_bytes else "memory unknown"
    if device.memory_free_bytes is not None:
        memory += f" ({device.memory_free_bytes / GIB:.1f} free)"
    parts = [device.name, device.arch, memory, "/".join(device.dtypes), device.notes]
    state = "" if device.state == "ok" else f"{device.state.upper()}: "
    return state + join_notes(*parts)
