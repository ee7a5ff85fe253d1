"""Detection of TPU chips on recorded machines."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from time import perf_counter

import pytest

from helpers import machines
from helpers.machines import Machine, tpu_chips
from tokenplane_core.backend.records import DetectReport
from tokenplane_tpu.device import detect

GIB = 1 << 30
Look = Callable[[Machine], DetectReport]


@pytest.fixture
def look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Look:
    return lambda machine: detect(machine.build(tmp_path, monkeypatch), machine.environ)


def test_eight_chips_of_which_two_are_taken(look: Look) -> None:
    report = look(machines.v5e_8())
    assert [device.state for device in report.devices] == ["busy", "busy", *["ok"] * 6]
    first, third = report.devices[0], report.devices[2]
    assert first.notes == "used by pid 31 (python3), v5litepod-8, 8 chips here, NUMA node 0"
    assert (third.index, third.name, third.arch, third.score) == (2, "Google TPU v5e", "v5e", 100)
    assert third.memory_total_bytes == 16 * GIB and third.memory_free_bytes is None


@pytest.mark.parametrize(
    ("device", "more", "name", "memory_gib", "note"),
    [
        (0x0027, {"subsystem_device": "0x004e"}, "Google TPU v2", 16, "2 devices of 8 GiB"),
        (0x0027, {"subsystem_device": "0x004f"}, "Google TPU v3", 32, "2 devices of 16 GiB"),
        (0x005E, {}, "Google TPU v4", 32, ""),
        (0x0062, {}, "Google TPU v5p", 95, ""),
        (0x006F, {}, "Google TPU v6e", 32, ""),
        (0x0076, {}, "Google TPU7x", 192, "2 devices of 96 GiB"),
    ],
)
def test_every_version_has_its_name_and_memory(
    look: Look, device: int, more: dict[str, str | int], name: str, memory_gib: int, note: str
) -> None:
    (found,) = look(tpu_chips(1, device, "v", Machine(), **more)).devices
    assert (found.name, found.memory_total_bytes, found.state) == (name, memory_gib * GIB, "ok")
    assert note in found.notes


def test_the_environment_chooses_chips(look: Look) -> None:
    report = look(machines.v5e_8().told(TPU_VISIBLE_CHIPS="3,0"))
    assert [device.uuid[-4:] for device in report.devices] == ["07.0", "04.0"]
    assert [device.state for device in report.devices] == ["ok", "busy"]


def test_hidden_chips_are_absent_and_the_variable_is_named(look: Look) -> None:
    report = look(machines.v6e_4().told(TPU_VISIBLE_CHIPS="8"))
    assert report.status == "absent" and "TPU_VISIBLE_CHIPS='8' hides every TPU chip" in report.reason


def test_chips_without_device_files_are_broken(look: Look) -> None:
    machine = machines.v6e_4()
    machine.nodes.clear()
    report = look(machine)
    assert report.status == "broken" and "4 x TPU v6e: /dev/vfio/10 is missing" in report.reason


def test_without_permission_a_chip_is_broken(look: Look) -> None:
    machine = machines.v6e_4()
    machine.nodes["dev/vfio/12"] = 0o600
    assert [device.state for device in look(machine).devices] == ["ok", "ok", "broken", "ok"]


# --- The metadata server ------------------------------------------------------------------------------------


class Metadata(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        asked = self.server.asked  # type: ignore[attr-defined]
        asked.append(self.path)
        answers = self.headers["Metadata-Flavor"] == "Google" and self.path.endswith("/accelerator-type")
        self.send_response(200 if answers else 403)
        self.end_headers()
        self.wfile.write(b"v5p-16\n" if answers else b"")

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def metadata() -> Iterator[HTTPServer]:
    with HTTPServer(("127.0.0.1", 0), Metadata) as server:
        server.asked = []  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def without_variable(machine: Machine, port: int) -> Machine:
    """As outside a container: only the metadata server knows the accelerator type."""
    del machine.environ["TPU_ACCELERATOR_TYPE"]
    return machine.told(GCE_METADATA_HOST=f"127.0.0.1:{port}")


def test_the_metadata_server_tells_the_slice(look: Look, metadata: HTTPServer) -> None:
    machine = without_variable(tpu_chips(4, 0x0062, "", Machine()), metadata.server_port)
    assert "v5p-16, 4 chips here" in look(machine).devices[0].notes


def test_it_is_asked_only_where_a_chip_is(look: Look, metadata: HTTPServer) -> None:
    report = look(machines.EPYC.told(GCE_METADATA_HOST=f"127.0.0.1:{metadata.server_port}"))
    assert report.reason == "no TPU chip on the PCI bus"
    assert metadata.asked == []  # type: ignore[attr-defined]


def test_a_metadata_server_that_keeps_silent_costs_half_a_second(look: Look) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        machine = without_variable(tpu_chips(1, 0x0063, "", Machine()), silent.getsockname()[1])
        start_s = perf_counter()
        assert look(machine).devices[0].notes == "NUMA node 0"
        assert perf_counter() - start_s < 1.9  # the kit gives detect() two seconds


def test_a_metadata_server_that_is_not_there_costs_nothing(look: Look) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert look(without_variable(tpu_chips(1, 0x0063, "", Machine()), port)).status == "found"
