"""Runs the sections, each in a child process, and writes what they found as JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

from tokenplane_core.backend.errors import BackendNotFound
from tokenplane_core.backend.plugins import ask

SECTIONS = {
    "kit": "the conformance kit's laws",
    "kernels": "every candidate's attention against the torch twins, on random batches",
    "models": "greedy tokens of small models in float32 against transformers",
    "peers": "throughput and latency beside transformers' generate and continuous batching",
    "ceilings": "steps as fractions of the bandwidth and compute rate measured here",
}
LIBRARIES = ("torch", "triton", "transformers", "flashinfer-python", "flash-attn", "vllm-xpu-kernels", "numpy")


def arguments() -> argparse.Namespace:
    sections = "\n".join(f"  {name:9} {what}" for name, what in SECTIONS.items())
    parser = argparse.ArgumentParser(
        prog="gpu_check", formatter_class=argparse.RawDescriptionHelpFormatter, epilog=f"sections:\n{sections}"
    )
    parser.add_argument("--backend", required=True, help="cuda, rocm, xpu, cpu ...")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="which ones, with commas; default: all")
    parser.add_argument("--size", choices=("small", "1b"), help="of the measured model; default: 1b, on a CPU small")
    parser.add_argument("--rounds", type=int, default=3, help="measured runs, of which the median counts; default: 3")
    parser.add_argument("--limit-s", type=float, default=1800, help="time limit of each section; default: 1800")
    parser.add_argument("--out", type=Path, help="where to write the JSON; default: standard output")
    parser.add_argument("--child", help=argparse.SUPPRESS)  # the one section to run in this process
    args = parser.parse_args()
    args.sections = args.sections.split(",")
    if unknown := [name for name in args.sections if name not in SECTIONS]:
        parser.error(f"--sections: there is no {unknown[0]!r}; there are {', '.join(SECTIONS)}")
    if args.rounds < 1:
        parser.error(f"--rounds is {args.rounds}; it must be at least 1")
    args.size = args.size or ("small" if args.backend == "cpu" else "1b")
    return args


def main() -> int:
    args = arguments()
    if args.child:
        args.out.write_text(json.dumps(run_section(args.child, args)))
        return 0
    try:
        report = facts_of_machine(args.backend)
    except BackendNotFound as error:
        print(error, file=sys.stderr)
        return 1
    sections: dict[str, dict[str, Any]] = {}
    for name in args.sections:
        result = sections[name] = run_in_child(name, args)
        print(f"{name}: {result['status']} ({result['seconds']} s){_dash(result['reason'])}", file=sys.stderr)
    text = json.dumps({**report, "sections": sections}, indent=1)
    if args.out:
        args.out.write_text(text + "\n")
    else:
        print(text)
    return int(any(result["status"] == "failed" for result in sections.values()))


def _dash(reason: str) -> str:
    return f" - {reason}" if reason else ""


def facts_of_machine(backend: str) -> dict[str, Any]:
    """What the numbers hold for."""
    report = ask(backend).report
    device = report.devices[0] if report.devices else None
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["scripts/gpu_check", *sys.argv[1:]]),
        "backend": backend,
        "status": report.status,
        "reason": report.reason,
        "device": device and device.name,
        "arch": device and device.arch,
        "memory_bytes": device and device.memory_total_bytes,
        "driver": device and device.notes,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpus": len(os.sched_getaffinity(0)),
        "libraries": {name: found for name in LIBRARIES if (found := _version(name))},
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def run_in_child(name: str, args: argparse.Namespace) -> dict[str, Any]:
    start_s = perf_counter()
    options = ["--backend", args.backend, "--size", args.size, "--rounds", str(args.rounds)]
    with TemporaryDirectory() as folder:
        out = Path(folder) / "section.json"
        command = [sys.executable, sys.argv[0], *options, "--child", name, "--out", str(out)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=args.limit_s)
            result = json.loads(out.read_text()) if out.is_file() else _died(done)
        except subprocess.TimeoutExpired:
            result = {"status": "failed", "reason": f"not done after {args.limit_s:g} s (--limit-s)"}
    return {"status": result["status"], "seconds": round(perf_counter() - start_s, 1), **result}


def _died(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    return {
        "status": "failed",
        "reason": f"its process ended with {done.returncode}",
        "facts": {"output": done.stdout[-2000:] + done.stderr[-4000:]},
    }


def run_section(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run a section in this process: {status, reason, facts}."""
    from gpu import checks, speed
    from gpu.subject import SectionFailed, SectionSkipped, Subject

    section = getattr(checks, name, None) or getattr(speed, name)
    try:
        facts = section(Subject(args.backend, args.size, args.rounds))
        return {"status": "ok", "reason": "", "facts": facts}
    except SectionFailed as failure:
        return {"status": "failed", "reason": str(failure), "facts": failure.facts}
    except SectionSkipped as reason:
        return {"status": "skipped", "reason": str(reason), "facts": {}}
    except Exception as error:  # reported, whatever it is: this is what the command is for
        return {"status": "failed", "reason": f"{type(error).__name__}: {error}", "facts": {}}
