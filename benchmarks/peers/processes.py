"""What a server's processes use, from /proc (Linux)."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def tree(pid: int) -> list[int]:
    """The process and all its descendants."""
    out = [pid]
    for process in out:
        for children in Path(f"/proc/{process}/task").glob("*/children"):
            try:
                out += map(int, children.read_text().split())
            except OSError:  # it ended meanwhile
                continue
    return out


def cpu_s(pid: int) -> float:
    """User plus system time that the living processes of the tree have used."""
    total = 0
    for process in tree(pid):
        try:
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        total += int(fields[11]) + int(fields[12])
    return total * TICK_S


def resident_bytes(pid: int) -> int:
    """Memory of the tree: proportional set size, so that pages shared between its processes count once."""
    total_kib = 0
    for process in tree(pid):
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total_kib += next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)
    return total_kib * 1024


def machine_cpu_s() -> float:
    """CPU time that everything on the machine has used since it started."""
    user, nice, system, _idle, _wait, irq, soft_irq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + soft_irq + steal) * TICK_S


@dataclass
class Watch:
    """Who used the processors since it was made: the server, this process, others."""

    pid: int

    def __post_init__(self) -> None:
        self.start_s = time.perf_counter()
        self.server_s, self.own_s, self.machine_s = cpu_s(self.pid), time.process_time(), machine_cpu_s()

    def foreign_share(self) -> float:
        """Share of all processors that neither the server nor this process used: noise from others."""
        ours = cpu_s(self.pid) - self.server_s + time.process_time() - self.own_s
        busy = machine_cpu_s() - self.machine_s
        return max(0.0, busy - ours) / ((time.perf_counter() - self.start_s) * (os.cpu_count() or 1))
