"""`tokenplane serve` and `tokenplane devices` as a user meets them."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from helpers.live_server import wait_until
from tokenplane_api import __version__
from tokenplane_api.cli import main
from tokenplane_api.flags import FLAGS, GROUPS


@pytest.fixture(autouse=True)
def process_as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`main` in this process sets up logging and LOG_LEVEL, as a program of its own may."""
    monkeypatch.setenv("LOG_LEVEL", "info")
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def run_cli(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, for a terminal of 80 columns."""
    command = [sys.executable, "-m", "tokenplane_api.cli", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, env={**os.environ, "COLUMNS": "80", **(environment or {})}
    )


class Serving:
    """A running `tokenplane serve`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        self.url = ""

    def read_until_ready(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip())
            if found := re.search(r"Ready after [\d.]+ s: ([^\s\"]+)", line):
                self.url = found[1]
                return
        raise AssertionError(f"it ended with {self.process.wait()}: {self.lines}")

    def read_rest(self) -> None:
        assert self.process.stderr is not None
        self.lines += [line.rstrip() for line in self.process.stderr]


SERVE = ("-m", "tokenplane_api.cli", "serve")


@contextmanager
def serving(*arguments: str, command: Sequence[str] = SERVE, **environment: str) -> Iterator[Serving]:
    process = subprocess.Popen(
        [sys.executable, *command, *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    watchdog = threading.Timer(60, process.kill)
    watchdog.start()
    running = Serving(process)
    try:
        running.read_until_ready()
        yield running
    finally:
        watchdog.cancel()
        if process.poll() is None:
            process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


def test_it_serves_says_what_it_is_and_stops_when_told(model_folder: Path) -> None:
    """Options come from the command line and the environment; SIGTERM lets the running stream finish."""
    options = ["--model-id", str(model_folder), "--hostname", "127.0.0.1", "--max-input-tokens", "100"]
    variables = {
        "PORT": "0",
        "TOKENPLANE_BACKEND": "simulated-cuda",
        "MAX_TOTAL_TOKENS": "300",
        "MAX_INPUT_TOKENS": "50",
        "SERVED_MODEL_NAME": "demo",
        "TOKENPLANE_SIMULATED_STEP_MS": "10",
    }
    with serving(*options, **variables) as running:
        text = "\n".join(running.lines)
        for word in ("Device: ", "simulated-cuda", "float32", "Kernels:", "KV cache: ", "MEMORY", "LIMIT"):
            assert word in text
        assert re.search(r"--max-input-tokens +100  as given", text), "the option wins"
        assert re.search(r"--max-total-tokens +300  as given", text)
        assert re.search(r"--max-batch-size +\d+  the backend's choice", text)
        assert re.search(r"--max-concurrent-requests +128  default", text)
        with httpx.Client(base_url=running.url, timeout=30) as client:
            info = client.get("/info").json()
            assert (info["max_input_tokens"], info["max_total_tokens"]) == (100, 300), "the option wins"
            body: dict[str, Any] = {"model": "demo", "prompt": "Go on.", "max_tokens": 100, "ignore_eos": True}
            with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
                lines = answer.iter_lines()
                next(lines)
                running.process.send_signal(signal.SIGTERM)
                assert list(lines)[-2:] == ["data: [DONE]", ""]
        assert running.process.wait(timeout=30) == 0
        running.read_rest()
        assert running.lines[-1].endswith("Stopped")
        assert not any("Traceback" in line or "ERROR" in line for line in running.lines)


def test_the_grace_period_ends_what_takes_too_long(model_folder: Path) -> None:
    options = ["--model-id", str(model_folder), "--backend", "simulated-cuda", "--hostname", "127.0.0.1", "-p", "0"]
    with serving(*options, "-g", "1", TOKENPLANE_SIMULATED_STEP_MS="50") as running:
        body: dict[str, Any] = {"prompt": "Go on.", "max_tokens": 1000, "ignore_eos": True, "stream": True}
        with (
            httpx.Client(timeout=30) as client,
            client.stream("POST", f"{running.url}/v1/completions", json=body) as answer,
        ):
            next(answer.iter_lines())
            running.process.send_signal(signal.SIGINT)
            assert running.process.wait(timeout=20) == 0
        running.read_rest()
        assert not any("Traceback" in line for line in running.lines), running.lines


def test_a_signal_while_the_model_loads_ends_it_cleanly(model_folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    options = ["--model-id", str(model_folder), "--backend", "simulated-cuda", "--hostname", "127.0.0.1", "-p", port]
    command = [sys.executable, "-m", "tokenplane_api.cli", "serve", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        wait_until(lambda: answers(f"http://127.0.0.1:{port}/live"), 30, "the port to open")
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=30)
    assert process.returncode == 0, said
    assert "Traceback" not in said


def answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--model-id", "/no/such/model"], 1, ["/no/such/model", "does not exist"]),
        (["--backend", "cudda"], 1, ["cudda", "Installed:"]),
        (["--device-index", "9"], 1, ["--device-index is 9"]),
        (["--max-total-tokens", "99999"], 1, ["99999", "2048"]),
        (["--max-total-tokens", "100", "--max-input-tokens", "100"], 1, ["--max-input-tokens is 100"]),
        (["--max-batch-total-tokens", "64", "--max-total-tokens", "500"], 1, ["500", "64", "KV cache"]),
        (["--quantize", "awq"], 1, ["--quantize is awq", "not quantized"]),
        (["--cuda-memory-fraction", "0.0000001"], 1, ["no room for a KV cache"]),
        (["--tokenizer-config-path", "/no/such/file"], 1, ["/no/such/file"]),
        (["--hostname", "no-such-host.invalid"], 1, ["no-such-host.invalid"]),
        (["--api-key", " "], 1, ["--api-key"]),
        (["--port", "70000"], 2, ["--port", "65535"]),
        (["--dtype", "int3"], 2, ["int3", "bfloat16"]),
        (["--max-batch-size", "0"], 2, ["--max-batch-size"]),
        (["--no-such-option"], 2, ["--no-such-option"]),
    ],
    ids=lambda value: str(value)[:50],
)
def test_a_wrong_start_is_one_clear_sentence(
    model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    words: list[str],
) -> None:
    defaults = [
        "--model-id",
        str(model_folder),
        "--backend",
        "simulated-cuda",
        "--hostname",
        "127.0.0.1",
        "--port",
        "0",
    ]
    monkeypatch.setattr(sys, "argv", ["tokenplane", "serve", *defaults, *arguments])
    with pytest.raises(SystemExit) as ending:
        main()
    said = capfd.readouterr().err
    assert ending.value.code == code
    assert "Traceback" not in said
    for word in words:
        assert word in said
    if code == 1:
        last = said.strip().splitlines()[-1]
        assert last.startswith("tokenplane: ")


def test_a_key_that_is_set_but_empty_is_refused(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("API_KEY", "")
    options = ["--model-id", str(model_folder), "--backend", "simulated-cuda", "--hostname", "127.0.0.1", "-p", "0"]
    monkeypatch.setattr(sys, "argv", ["tokenplane", "serve", *options])
    with pytest.raises(SystemExit) as ending:
        main()
    assert ending.value.code == 1
    assert "API_KEY" in capfd.readouterr().err


def test_a_busy_port_is_named(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        options = [
            "--model-id",
            str(model_folder),
            "--backend",
            "simulated-cuda",
            "--hostname",
            "127.0.0.1",
            "-p",
            port,
        ]
        monkeypatch.setattr(sys, "argv", ["tokenplane", "serve", *options])
        with pytest.raises(SystemExit) as ending:
            main()
    assert ending.value.code == 1
    said = capfd.readouterr().err
    assert port in said and "in use" in said


def test_a_host_name_in_the_environment_is_no_address(model_folder: Path) -> None:
    """Containers set HOSTNAME; an address there, or any name given as an option, means what it says."""
    options = ["--model-id", str(model_folder), "--backend", "simulated-cuda", "-p", "0"]
    with serving(*options, HOSTNAME="pod-7f9c") as running:
        assert any("'pod-7f9c', which is no IP address; listening on 0.0.0.0" in line for line in running.lines)
    with serving(*options, HOSTNAME="127.0.0.1") as running:
        assert running.url.startswith("http://127.0.0.1:")


def test_a_tgi_deployment_starts_and_logs_what_its_scripts_look_for(model_folder: Path, tmp_path: Path) -> None:
    """Its command, flags that ask for nothing here, a file for the rest, and a JSON log with a message `Connected`."""
    file = tmp_path / "server.yaml"
    file.write_text(f"model-id: {model_folder}\nbackend: simulated-cuda\ncuda_memory_fraction: 0.00001\nport: 1\n")
    options = ["--config", str(file), "--hostname", "127.0.0.1", "--num-shard", "1", "--json-output"]
    code = "from tokenplane_api.cli import main_of_tgi; main_of_tgi()"
    with serving(*options, command=["-c", code], PORT="0", MAX_WAITING_TOKENS="20", USAGE_STATS="off") as running:
        messages = [json.loads(line)["message"] for line in running.lines]
        assert httpx.get(f"{running.url}/health", timeout=10).status_code == 200
        info = httpx.get(f"{running.url}/info", timeout=10).json()
    assert "Connected" in messages
    assert any(re.fullmatch(r"Using attention .+ - Prefix caching true", message) for message in messages)
    (tokens,) = [found[1] for m in messages if (found := re.fullmatch(r"Setting max batch total tokens to (\d+)", m))]
    assert int(tokens) == info["max_batch_total_tokens"] < 2048, "a hundred-thousandth of the memory"
    assert any(re.search(rf"--max-total-tokens +{tokens}  all that the KV cache holds", m) for m in messages)
    assert any("--max-waiting-tokens is 20 (MAX_WAITING_TOKENS); nothing to do: " in message for message in messages)
    assert any("--port is 0 (PORT)" in message for message in messages), "what was given, and where"


@pytest.mark.parametrize("variable", ["ROPE_SCALING", "TGI_WIGGLE_ROOM"])
def test_a_refused_variable_ends_the_start(variable: str, capfd: pytest.CaptureFixture[str]) -> None:
    ended = run_cli("serve", "--model-id", "x", environment={variable: "1"})
    assert ended.returncode == 1
    (sentence,) = ended.stderr.splitlines()
    assert sentence.startswith("tokenplane: ") and f"{variable}" in sentence


def test_env_prints_versions_and_devices_with_no_model() -> None:
    shown = run_cli("serve", "--env")
    assert shown.returncode == 0
    for word in ("Tokenplane", __version__, "Python", "fastapi", "BACKEND", "cpu"):
        assert word in shown.stdout


@pytest.mark.parametrize("columns", [80, 120])
def test_help_shows_every_honoured_option_whole(columns: int) -> None:
    helped = run_cli("serve", "--help", environment={"COLUMNS": str(columns)})
    assert helped.returncode == 0
    assert [line[:-1] for line in helped.stdout.splitlines() if re.fullmatch(r"\w+:", line)] == [*GROUPS, "Other"]
    options, lists = helped.stdout.split("Accepted from TGI")
    for flag in FLAGS:
        assert re.search(rf"--{flag.name}\b", options if flag.verdict == "honoured" else lists)
    text = " ".join(options.split())
    assert "[TOKENPLANE_BACKEND; default: the best found]" in text
    assert "Port to listen on; 0: any free one. [default: 3000]" in text
    assert max(map(len, helped.stdout.splitlines())) <= columns


def test_version_and_bare_command() -> None:
    assert run_cli("--version").stdout.strip() == f"tokenplane {__version__}"
    assert run_cli("serve", "--version").stdout.strip().endswith(f" {__version__}")
    bare = run_cli()
    assert bare.returncode == 2
    assert "serve" in bare.stderr and "devices" in bare.stderr


def test_devices_are_listed_for_people_and_for_programs() -> None:
    listed = run_cli("devices")
    assert listed.returncode == 0
    assert "simulated-cuda" in listed.stdout.splitlines()[-1]
    answers = {answer["backend"]: answer for answer in json.loads(run_cli("devices", "--json").stdout)["backends"]}
    assert answers["simulated-cuda"]["status"] == "found"
    assert answers["simulated-cuda"]["devices"][0]["kind"] == "simulated"
    for name in set(answers) - {"simulated-cuda", "simulated-tpu", "simulated-gaudi", "simulated-neuron"}:
        assert any(line.startswith(name) for line in listed.stdout.splitlines())
