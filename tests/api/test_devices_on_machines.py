"""What `tokenplane devices` tells a person at each recorded machine."""

from __future__ import annotations

from pathlib import Path

import pytest

import tokenplane_cpu.device
import tokenplane_cuda.device
import tokenplane_gaudi.device
import tokenplane_neuron.device
import tokenplane_rocm.device
import tokenplane_tpu.device
import tokenplane_xpu.device
from helpers.machines import MACHINES, Machine
from tokenplane_api.devices import devices_table, format_table
from tokenplane_core.backend.choice import missing_hardware
from tokenplane_core.backend.plugins import PluginAnswer
from tokenplane_core.backend.records import CONTRACT_VERSION, DetectReport


def detect(machine: Machine, root: Path, backend: str) -> DetectReport:
    environ, torch = machine.environ, machine.torch
    match backend:
        case "cpu":
            return tokenplane_cpu.device.detect(root)
        case "cuda":
            return tokenplane_cuda.device.detect(root, environ, machine.nvml, torch)
        case "rocm":
            return tokenplane_rocm.device.detect(root, environ, torch)
        case "xpu":
            return tokenplane_xpu.device.detect(root, environ, torch)
        case "gaudi":
            return tokenplane_gaudi.device.detect(root, environ)
        case "neuron":
            return tokenplane_neuron.device.detect(root, environ)
        case _:
            return tokenplane_tpu.device.detect(root, environ)


def said(machine: Machine, root: Path, installed: str) -> str:
    """The table, in one line so that it does not matter where it is wrapped."""
    answers = [
        PluginAnswer(name, f"tokenplane-{name}", "0.1.0", CONTRACT_VERSION, detect(machine, root, name), 0.0)
        for name in installed.split()
    ]
    return " ".join(format_table(answers, missing_hardware(answers, root)).split())


NEEDED = [
    ("eight H100", "cpu cuda", "NVIDIA H100 80GB HBM3, sm_90, 79.6 GiB (4.2 free)"),
    ("eight H100", "cpu cuda", "used by pid 4711 (vllm), driver 580.95.05, NUMA node 0"),
    ("eight H100", "cpu cuda", "3: BUSY: NVIDIA H100"),
    ("eight H100", "cpu cuda", "5: BROKEN: NVIDIA GPU 5"),
    ("eight H100", "cpu cuda", "takes cuda device 1 (the most free memory of 6; passed over: 3 is busy, 5 is broken)"),
    ("eight H100", "cpu", '8 x NVIDIA GPU at 0000:1b:00.0 and 7 more: pip install "tokenplane[cuda]"'),
    ("eight H100", "cpu", "refuses to start"),
    ("eight H100", "cpu", "choose a backend yourself: --backend cpu"),
    ("split A100", "cuda", "0: NVIDIA A100-SXM4-40GB MIG 3g.20gb, sm_80, 19.6 GiB"),
    ("split A100", "cuda", "2: BROKEN: NVIDIA A100-SXM4-40GB"),
    ("laptop with an RTX", "cpu cuda", "takes cuda device 0 (the only one)"),
    ("laptop with an RTX", "cpu cuda", '1 x Intel GPU at 0000:00:02.0, for display: pip install "tokenplane[xpu]"'),
    ("old driver", "cpu cuda", "driver 470.57.02 is too old: it knows CUDA 11.4"),
    ("old driver", "cpu cuda", "needs CUDA 12.0, driver 525 or newer"),
    ("old driver", "cpu cuda", "refuses to start: cuda cannot be used"),
    ("driver just updated", "cpu cuda", "have different versions, as after an update: reboot"),
    ("container without permission", "cpu cuda", "no permission to open /dev/nvidiactl"),
    ("nouveau", "cpu cuda", "(its kernel driver is nouveau), but libnvidia-ml.so.1 is not: install NVIDIA's driver"),
    ("eight MI300X", "cpu rocm", "0: AMD Instinct MI300X OAM, gfx942, 192.0 GiB (12.0 free)"),
    ("eight MI300X", "cpu rocm", "used by pid 812 (sglang)"),
    ("eight MI300X", "cpu rocm", "takes rocm device 1 (the most free memory of 7)"),
    ("MI250", "cpu rocm", "0: AMD Instinct MI250, gfx90a, 64.0 GiB"),
    ("no render group", "cpu rocm", "1 x AMD GPU (gfx1100): no permission to open /dev/kfd"),
    ("two kinds of card", "cpu cuda", "takes cuda device 0"),
    ("two kinds of card", "cpu cuda", '1 x AMD GPU at 0000:c3:00.0: pip install "tokenplane[rocm]"'),
    (
        "two kinds of card",
        "cpu cuda rocm",
        "is built for CUDA 12.8; install its ROCm build, in an environment of its own",
    ),
    ("two kinds of card", "cpu cuda rocm", "choose a backend yourself: --backend cuda"),
    ("Intel Max 1550", "cpu xpu", "0: Intel Data Center GPU Max 1550, xe-hpc, 64.0 GiB"),
    ("Intel Max 1550", "cpu xpu", "tile 1 of 0000:3a:00.0"),
    ("Arc desktop", "cpu xpu", "0: Intel Arc B580, xe2-hpg, 12.0 GiB"),
    ("old integrated GPU", "cpu xpu", "takes cpu device 0"),
    ("old integrated GPU", "cpu", "takes cpu device 0"),
    ("eight Gaudi 2", "cpu gaudi", "0: BUSY: Intel Gaudi 2, gaudi2, 96.0 GiB, bfloat16/float32, used by pid 1234"),
    ("eight Gaudi 2", "cpu gaudi", "6: BROKEN: Intel Gaudi 2"),
    ("eight Gaudi 2", "cpu gaudi", "takes gaudi device 1 (the first of 5 alike"),
    ("Gaudi 3", "cpu gaudi", "Intel Gaudi 3, gaudi3, 128.0 GiB"),
    ("trn2", "cpu neuron", "0: BUSY: AWS Trainium2"),
    ("trn2", "cpu neuron", "8-15: AWS Trainium2, neuroncore-v3, 96.0 GiB (96.0 free)"),
    ("inf2", "cpu neuron", "AWS Inferentia2, neuroncore-v2, 32.0 GiB (32.0 free)"),
    ("v5e-8", "cpu tpu", "0-1: BUSY: Google TPU v5e, v5e, 16.0 GiB"),
    ("v5e-8", "cpu tpu", "takes tpu device 2"),
    ("v6e-16", "cpu tpu", "v6e-16, 4 chips here"),
    ("v6e-16", "cpu", 'pip install "tokenplane[tpu]"'),
    ("pod with limits", "cpu", "8.0 GiB (5.0 free)"),
    ("pod with limits", "cpu", "2 of 4 CPUs used"),
    ("pod with limits", "cpu", "memory limited by cgroup (machine: 64.0 GiB)"),
    ("Raspberry Pi", "cpu", "Raspberry Pi 5 Model B Rev 1.0 (Arm Cortex-A76), aarch64+neon, 8.0 GiB"),
    ("Graviton", "cpu", "Arm Neoverse-V1, aarch64+neon+sve+i8mm+bf16, 64.0 GiB"),
    ("Graviton", "cpu", "8 of 8 CPUs used, bfloat16 native"),
]


@pytest.mark.parametrize(("machine", "installed", "needed"), NEEDED)
def test_a_person_is_told_what_they_need(
    machine: str, installed: str, needed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = MACHINES[machine]()
    assert needed in said(recorded, recorded.build(tmp_path, monkeypatch), installed)


def test_every_recorded_machine_is_looked_at() -> None:
    assert {machine for machine, _, _ in NEEDED} == set(MACHINES)


@pytest.mark.parametrize("machine", MACHINES)
def test_every_plugin_answers_at_every_machine(machine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found with devices, or a reason in a sentence; whatever other hardware is there."""
    recorded = MACHINES[machine]()
    root = recorded.build(tmp_path, monkeypatch)
    for backend in ("cpu", "cuda", "rocm", "xpu", "gaudi", "neuron", "tpu"):
        report = detect(recorded, root, backend)
        assert (report.status == "found") == bool(report.devices)
        assert report.devices or report.reason
        assert all(device.notes for device in report.devices if device.state != "ok")


def test_on_this_machine_the_cpu_its_isa_cores_and_memory_are_named() -> None:
    (device,) = tokenplane_cpu.device.detect().devices
    table = " ".join(devices_table().split())
    assert f"0: {device.name}, {device.arch}, {device.memory_total_bytes / 2**30:.1f} GiB" in table
    assert "CPUs used" in table
