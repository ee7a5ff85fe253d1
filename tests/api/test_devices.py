"""`tokenplane devices`: one row for each plugin, whatever state it is in."""

from __future__ import annotations

from dataclasses import replace

from tokenplane_api.devices import format_table, json_report
from tokenplane_core.backend.hardware import Hardware
from tokenplane_core.backend.plugins import PluginAnswer
from tokenplane_core.backend.records import DetectReport, Device


def device(kind: str, name: str) -> Device:
    return Device(kind, 0, name, "arch", 8 * 2**30, ("float32",), 1, memory_free_bytes=2**30, notes="4 cores")


def answer(name: str, report: DetectReport, contract: str = "0.1") -> PluginAnswer:
    return PluginAnswer(name, f"tokenplane-{name}", "1.2.3", contract, report, 0.1)


def test_found_absent_and_broken_stand_side_by_side() -> None:
    table = format_table(
        [
            answer("cpu", DetectReport("found", (device("cpu", "Example CPU"),))),
            answer("cuda", DetectReport("absent", reason="no NVIDIA driver is loaded")),
            answer("rocm", DetectReport("broken", reason="cannot be imported: no module named x"), contract=""),
            answer("simulated-cuda", DetectReport("found", (device("simulated", "Simulated"),))),
            answer("simulated-tpu", DetectReport("found", (device("simulated", "Simulated"),))),
        ]
    )
    lines = table.splitlines()
    assert lines[0].split() == ["BACKEND", "VERSION", "CONTRACT", "STATUS"]
    assert lines[1].split() == ["cpu", "1.2.3", "0.1", "found"]
    assert lines[2].strip() == "0: Example CPU, arch, 8.0 GiB (1.0 free), float32, 4 cores"
    assert lines[3].split() == ["cuda", "1.2.3", "0.1", "absent"]
    assert lines[4].strip() == "no NVIDIA driver is loaded"
    assert lines[5].split() == ["rocm", "1.2.3", "?", "broken"]
    assert "no module named x" in lines[6]
    assert lines[-3] == "Repair or uninstall it, or choose a backend yourself: --backend cpu"
    assert lines[-1] == "Simulated devices, used only when named with --backend: simulated-cuda, simulated-tpu"
    assert sum("simulated" in line for line in lines) == 1


def test_without_a_plugin_it_says_what_to_install() -> None:
    assert 'pip install "tokenplane[cpu]"' in format_table([])


def test_devices_that_say_the_same_share_a_line() -> None:
    alike = [replace(device("cuda", "H100"), index=i) for i in range(5)]
    taken = replace(alike[2], state="busy", notes="used by pid 7")
    lines = format_table([answer("cuda", DetectReport("found", (*alike[:2], taken, *alike[3:])))]).splitlines()
    assert [line.strip().partition(":")[0] for line in lines[2:5]] == ["0-1", "2", "3-4"]
    assert lines[3].startswith("  2: BUSY: H100") and "used by pid 7" in lines[3]
    apart = tuple(replace(device("neuron", "Trainium2"), index=i) for i in (0, 2))
    assert "  0, 2: Trainium2" in format_table([answer("neuron", DetectReport("found", apart))])


def test_the_json_report_has_backends_missing_hardware_and_the_default() -> None:
    card = Hardware("rocm", "1 x AMD GPU at 0000:05:00.0", is_accelerator=True)
    cpu = answer("cpu", DetectReport("found", (device("cpu", "Example CPU"),)))
    report = json_report([cpu], [])
    assert report["backends"][0]["devices"][0].name == "Example CPU"
    assert report["default"] == {"backend": "cpu", "device_index": 0, "reason": "the only one"}
    report = json_report([cpu], [card])
    assert report["missing"][0]["install"] == 'pip install "tokenplane[rocm]"'
    assert report["default"]["backend"] is None and "tokenplane[rocm]" in report["default"]["reason"]
