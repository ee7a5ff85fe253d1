"""What the `detect` of several plugins share: reading /proc, /sys and /dev below a root, without a driver library.

Nothing here raises for a file that is missing, damaged or not ours to read, and nothing opens a device. Tests replace
the root by a recorded tree. Knows no vendor; `hardware.py` knows which PCI device is whose.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .records import DetectReport, Device

ACCELERATOR_SCORE = 100
"""Device.score of every accelerator. Among equals the card with the most free memory is chosen."""

INTEGRATED_SCORE = 20
"""Device.score of a GPU that shares the processor's memory: better than the CPU (1), worse than any card."""

GIB = 1 << 30


# --- Files --------------------------------------------------------------------------------------------------


def read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def read_number(file: Path) -> int | None:
    """A number as the kernel writes it: decimal, or hexadecimal with 0x. Below zero it means "none"."""
    try:
        number = int(read_text(file), 0)
    except ValueError:
        return None
    return number if number >= 0 else None


def read_properties(file: Path) -> dict[str, int]:
    """Lines of `name number`; lines of another form are passed over."""
    lines = (line.split() for line in read_text(file).splitlines())
    return {line[0]: int(line[1]) for line in lines if len(line) == 2 and line[1].isdigit()}


def number_list(text: str) -> Iterator[int]:
    """`0-3,8` as the kernel writes it."""
    for part in text.strip().split(","):
        first, _, last = (number.strip() for number in part.partition("-"))
        if first.isdigit() and (last or first).isdigit():
            yield from range(int(first), int(last or first) + 1)


def meminfo_bytes(root: Path) -> dict[str, int]:
    """/proc/meminfo: MemTotal, MemAvailable and the rest, in bytes."""
    lines = re.findall(r"^(\w+): +(\d+) kB$", read_text(root / "proc/meminfo"), re.MULTILINE)
    return {name: int(kib) * 1024 for name, kib in lines}


# --- Cards --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PciDevice:
    address: str  # 0000:65:00.0
    vendor: int
    device: int
    pci_class: int  # base class and subclass: 0x0302 is a 3D controller, 0x1200 a processing accelerator
    folder: Path

    @property
    def driver(self) -> str:
        """Name of the kernel driver that holds the device, or ""."""
        try:
            return (self.folder / "driver").readlink().name
        except OSError:
            return ""

    @property
    def numa_note(self) -> str:
        node = read_number(self.folder / "numa_node")
        return "" if node is None else f"NUMA node {node}"


def pci_devices(root: Path) -> list[PciDevice]:
    """Every PCI device, by address."""
    found = []
    for folder in sorted((root / "sys/bus/pci/devices").glob("*")):
        vendor, device, pci_class = (read_number(folder / name) for name in ("vendor", "device", "class"))
        if vendor is not None and device is not None:
            found.append(PciDevice(folder.name, vendor, device, (pci_class or 0) >> 8, folder))
    return found


def addresses(cards: Sequence[PciDevice]) -> str:
    """`0000:65:00.0 and 7 more`, for a sentence."""
    rest = f" and {len(cards) - 1} more" if len(cards) > 1 else ""
    return f"{cards[0].address}{rest}"


def visible(wanted: str, names: Sequence[str], num_indexed: int | None = None) -> list[int]:
    """Which of `names` a `*_VISIBLE_DEVICES` list leaves visible, as indices in the order of the list.

    An entry is an index below `num_indexed` (None: all names have one) or the beginning of exactly one name. The
    first entry that is neither, or that repeats an earlier one, ends the list: CUDA documents that of invalid entries
    (CUDA programming guide, environment variables), the ROCm runtime does both (amd_filter_device.cpp).
    """
    limit = len(names) if num_indexed is None else num_indexed
    chosen: list[int] = []
    for entry in (part.strip() for part in wanted.split(",")):
        if entry.isdigit():
            matches = [int(entry)] if int(entry) < limit else []
        else:
            matches = [i for i, name in enumerate(names) if entry and name.lower().startswith(entry.lower())]
        if len(matches) != 1 or matches[0] in chosen:
            break
        chosen += matches
    return chosen


# --- Device nodes and who uses them -------------------------------------------------------------------------


def node_problem(root: Path, node: str) -> str:
    """Why this process could not open the device node (`dev/kfd`), and what to do; "" if it could.

    Looks at the file's mode only. A container's device cgroup may refuse all the same, which only opening shows.
    """
    file = root / node
    try:
        group_id = file.stat().st_gid
    except OSError:
        return f"/{node} is missing; in a container, pass it in with --device /{node}"
    if os.access(file, os.R_OK | os.W_OK):
        return ""
    if group_id == 0:
        return f"no permission to open /{node}, which belongs to root: run as root, or give it a group with a udev rule"
    try:
        group = file.group()
    except (KeyError, NotImplementedError):
        group = str(group_id)
    return (
        f"no permission to open /{node}, which belongs to group {group}: sudo usermod -aG {group} $USER and log in"
        f" again; in a container, --group-add {group_id}"
    )


def holders(root: Path, nodes: Collection[str]) -> dict[str, list[int]]:
    """Node (`dev/neuron0`) -> the processes that have it open, from /proc.

    Only processes this user may look into are seen: as root all of this PID namespace, else the user's own.
    """
    wanted = {f"/{node}": node for node in nodes}
    found: dict[str, set[int]] = {node: set() for node in nodes}
    for folder in (root / "proc").glob("[0-9]*/fd") if wanted else ():
        for target in _open_files(folder) & wanted.keys():
            found[wanted[target]].add(int(folder.parent.name))
    return {node: sorted(pids) for node, pids in found.items()}


def _open_files(folder: Path) -> set[str]:
    """What /proc/PID/fd points to. Processes of others may not be looked into, and files are closed meanwhile."""
    try:
        entries = os.listdir(folder)
    except OSError:
        return set()
    targets = set()
    for entry in entries:
        with contextlib.suppress(OSError):
            targets.add(os.readlink(folder / entry))
    return targets


def users_note(root: Path, pids: Sequence[int]) -> str:
    """`used by pid 4711 (python3) and 2 more`; "" if nobody is known."""
    if not pids:
        return ""
    name = read_text(root / f"proc/{pids[0]}/comm")
    rest = f" and {len(pids) - 1} more" if len(pids) > 1 else ""
    return f"used by pid {pids[0]}{f' ({name})' if name else ''}{rest}"


def join_notes(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


# --- Answers ------------------------------------------------------------------------------------------------


def found(devices: Sequence[Device], reason: str = "") -> DetectReport:
    """The report of these devices, numbered from 0."""
    return DetectReport("found", tuple(replace(device, index=i) for i, device in enumerate(devices)), reason)


def hidden(setting: str, what: str, count: int) -> DetectReport:
    """The user's own environment hides everything: absent, since that is a wish and nothing to repair."""
    return DetectReport("absent", reason=f"{setting} hides every {what} of this machine (it has {count})")


# --- The installed torch ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TorchBuild:
    """What the installed torch was built for; None where it was not."""

    version: str
    cuda: str | None = None  # 12.8
    hip: str | None = None  # 7.0.51831
    xpu: str | None = None  # 20250200

    @property
    def targets(self) -> dict[str, str]:
        """CUDA, ROCm or XPU -> its version."""
        named = {"CUDA": self.cuda, "ROCm": self.hip, "XPU": self.xpu}
        return {name: version for name, version in named.items() if version}


def torch_problem(torch: TorchBuild | None, target: str) -> str:
    """Why the installed torch cannot compute on `target` (CUDA, ROCm or XPU); "" if it can."""
    if torch is None:
        return "torch is not installed"
    if target in torch.targets:
        return ""
    built_for = ", ".join(f"{name} {version}" for name, version in torch.targets.items()) or "the CPU only"
    return (
        f"the installed torch {torch.version} is built for {built_for}; install its {target} build, in an environment"
        " of its own"
    )


def torch_build() -> TorchBuild | None:
    """Read torch/version.py as text: importing torch takes seconds, and detect() has two."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    text = read_text(Path(spec.origin).with_name("version.py"))
    values = dict(re.findall(r"^(__version__|cuda|hip|xpu)\b[^=\n]*= '([^'\n]*)'", text, re.MULTILINE))
    return TorchBuild(values.get("__version__", ""), values.get("cuda"), values.get("hip"), values.get("xpu"))
