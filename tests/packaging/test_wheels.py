"""`tokenplane[cpu]` installs from its wheels into a clean environment and answers a request there."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DISTRIBUTIONS = [
    ".",
    "core",
    "api",
    *sorted(f"backends/{path.parent.name}" for path in ROOT.glob("backends/*/pyproject.toml")),
]


# Needs a package index for torch and the rest, so it is no part of `make test`: `make dist` runs it on what it built.
pytestmark = pytest.mark.package_index


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new virtual environment with tokenplane[cpu], installed from the wheels in dist/."""
    wheels = ROOT / "dist"
    assert len(list(wheels.glob("tokenplane*.whl"))) == len(DISTRIBUTIONS), "run `make dist`"
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    # Which torch is a question of the machine (constraints.txt); the wheels only say what range they run on.
    constraints = ("--constraint", str(ROOT / "constraints.txt"))
    run(str(python), "-m", "pip", "install", "-q", *constraints, "--find-links", str(wheels), "tokenplane[cpu]")
    return home


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=clean_environment())
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}


def test_the_installed_server_answers_a_chat_request(environment: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        str(environment / "bin" / "tokenplane"), "serve", "--model-id", str(ROOT / "models" / "demo"),
        "--backend", "cpu", "--hostname", "127.0.0.1", "--port", str(port),
    ]  # fmt: skip
    log = tmp_path / "log"
    with log.open("w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, env=clean_environment(), cwd=tmp_path)
    try:
        wait_until_ready(port, server, log)
        body = {"model": "tgi", "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 20, "temperature": 0}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions",
            json.dumps(body).encode(),
            {"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            answer = json.load(response)
        assert answer["choices"][0]["message"]["content"].strip()
        assert answer["usage"]["completion_tokens"] > 0
    finally:
        server.terminate()
        assert server.wait(timeout=30) == 0, log.read_text()


def wait_until_ready(port: int, server: subprocess.Popen[bytes], log: Path, limit_s: float = 120) -> None:
    end_s = time.monotonic() + limit_s
    while time.monotonic() < end_s:
        assert server.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"not ready after {limit_s} s:\n{log.read_text()}")


def test_the_native_kernels_are_installed_and_need_no_compiler(environment: Path) -> None:
    (wheel,) = (ROOT / "dist").glob("tokenplane_cpu-*.whl")
    assert wheel.stem.endswith(sysconfig.get_platform().replace("-", "_").replace(".", "_"))
    said = run(str(environment / "bin" / "python"), "-c", "from tokenplane_cpu.native import isa; print(isa())")
    assert said.strip() in {"generic", "avx2", "avx512", "avx512_bf16", "amx"}


def test_without_a_compiler_the_cpu_backend_can_be_built_without_kernels(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT / "backends" / "cpu")]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=600,
        env=clean_environment() | {"TOKENPLANE_CPU_NATIVE": "0", "CXX": "/no/such/compiler"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-none-any.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]


def test_devices_lists_the_installed_plugins(environment: Path) -> None:
    answers = json.loads(run(str(environment / "bin" / "tokenplane"), "devices", "--json"))
    assert "cpu" in json.dumps(answers)
