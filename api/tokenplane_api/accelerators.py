"""A catalogue of accelerators for `tokenplane plan`: what a device holds, for planning without having it.

It lies in the API, where no backend can import it: what serves is what `detect` finds, never a name in this list.

Sizes are what the vendor's own tool reports as total where that is published (nvidia-smi with ECC as delivered,
rocm-smi, torch.xpu), because a "24 GB" card shows 22.5 GiB; else the capacity of the data sheet. One entry is what one
process addresses as one device: a tile of an Intel Max 1550, a die (GCD) of an MI250X, a whole TPU or Neuron chip.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from tokenplane_core.backend.errors import ConfigError
from tokenplane_core.backend.records import Device, Offer

_BF16 = ("bfloat16", "float16", "float32")
_FP16 = ("float16", "float32")
_TPU = ("bfloat16", "float32")


@dataclass(frozen=True, slots=True)
class Accelerator:
    name: str
    backend: str
    memory_mib: int
    dtypes: tuple[str, ...] = _BF16
    notes: str = ""


ACCELERATORS = (
    # nvidia-smi, memory.total
    Accelerator("T4", "cuda", 15360, _FP16),
    Accelerator("V100 16GB", "cuda", 16384, _FP16),
    Accelerator("V100 32GB", "cuda", 32768, _FP16),
    Accelerator("A10", "cuda", 23028),
    Accelerator("A40", "cuda", 46068),
    Accelerator("A100 40GB", "cuda", 40960),
    Accelerator("A100 80GB", "cuda", 81920),
    Accelerator("L4", "cuda", 23034),
    Accelerator("L40S", "cuda", 46068),
    Accelerator("H100", "cuda", 81559),
    Accelerator("H200", "cuda", 143771),
    Accelerator("B200", "cuda", 183359),
    Accelerator("RTX 3090", "cuda", 24576),
    Accelerator("RTX 4090", "cuda", 24564),
    Accelerator("RTX 5090", "cuda", 32607),
    Accelerator("RTX 6000 Ada", "cuda", 49140),
    # AMD GPU specifications (rocm.docs.amd.com), less 16 MiB that rocm-smi does not count
    Accelerator("MI210", "rocm", 65520),
    Accelerator("MI250X", "rocm", 65520, notes="one GCD of two"),
    Accelerator("MI300X", "rocm", 196592),
    Accelerator("MI325X", "rocm", 262128),
    Accelerator("MI350X", "rocm", 294896),
    Accelerator("MI355X", "rocm", 294896),
    # torch.xpu for the Max 1550; data sheets for the others
    Accelerator("Max 1100", "xpu", 49152),
    Accelerator("Max 1550", "xpu", 65520, notes="one tile of two"),
    Accelerator("Arc Pro B60", "xpu", 24 << 10),
    # Intel Gaudi white papers
    Accelerator("Gaudi2", "gaudi", 96 << 10),
    Accelerator("Gaudi3", "gaudi", 128 << 10),
    # cloud.google.com/tpu/docs, HBM of a chip
    Accelerator("TPU v4", "tpu", 32 << 10, _TPU),
    Accelerator("TPU v5e", "tpu", 16 << 10, _TPU),
    Accelerator("TPU v5p", "tpu", 95 << 10, _TPU),
    Accelerator("TPU v6e", "tpu", 32 << 10, _TPU),
    # AWS Neuron hardware guide, device memory of a chip
    Accelerator("Trainium1", "neuron", 32 << 10, notes="a chip of 2 NeuronCores"),
    Accelerator("Trainium2", "neuron", 96 << 10, notes="a chip of 8 NeuronCores"),
    Accelerator("Inferentia2", "neuron", 32 << 10, notes="a chip of 2 NeuronCores"),
)

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?)B?", re.IGNORECASE)
_MAKERS = re.compile(r"^(nvidia|amd|intel|google|aws|instinct|geforce|tesla|data ?center ?gpu)[ -]+", re.IGNORECASE)


def imagined_device(name: str) -> Device:
    """The device of that name in the catalogue, or one of that size (80GiB), all of it free.

    Raises:
        ConfigError: it is neither; names what comes close.
    """
    if size := _SIZE.fullmatch(name.strip()):
        unit = size[2].lower()
        base = 1024 if unit.endswith("i") else 1000
        num_bytes = int(float(size[1]) * base ** ("kmgt".index(unit[0]) + 1))
        return _device("", f"a device of {name.strip()}", num_bytes, _BF16)
    plain = name.strip()
    while (shorter := _MAKERS.sub("", plain)) != plain:
        plain = shorter
    found = [a for a in ACCELERATORS if _key(a.name) == _key(plain)]
    if not found:
        found = [a for a in ACCELERATORS if re.fullmatch(re.escape(_key(plain)) + r"\d+gb", _key(a.name))]
    if len(found) == 1:
        return _imagine(found[0])
    if found:
        raise ConfigError(f"--device {name!r} may be {' or '.join(repr(a.name) for a in found)}; give one of them")
    keys = {_key(a.name): a.name for a in ACCELERATORS}
    wanted = _key(plain)
    near = difflib.get_close_matches(wanted, keys, n=3) or [key for key in keys if wanted and wanted in key]
    close = [keys[key] for key in near]
    hint = f"did you mean {' or '.join(close)}?" if close else f"known are {', '.join(keys.values())}."
    raise ConfigError(
        f"--device {name!r} is neither in the catalogue nor a backend installed here; {hint} Any size works too, such"
        " as --device 80GiB"
    )


def by_memory() -> list[tuple[str, Device]]:
    """The catalogue, smallest memory first."""
    return [(known.name, _imagine(known)) for known in sorted(ACCELERATORS, key=lambda known: known.memory_mib)]


def _imagine(known: Accelerator) -> Device:
    return _device(known.backend, known.name, known.memory_mib << 20, known.dtypes, known.notes)


def _device(kind: str, name: str, memory_bytes: int, dtypes: tuple[str, ...], notes: str = "") -> Device:
    return Device(kind, 0, name, "", memory_bytes, dtypes, score=0, notes=notes, offer=_offer(kind, memory_bytes))


def _offer(kind: str, memory_bytes: int) -> Offer:
    """What the backend of that kind does unless told otherwise; a test holds it to the installed backends."""
    if kind in ("cuda", "rocm", "xpu"):
        return Offer(256, 8192, max(512 << 20, memory_bytes // 25), decode_graphs=23)
    return Offer(decode_graphs=None if kind in ("tpu", "gaudi", "neuron") else 0)


def _key(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).lower()
