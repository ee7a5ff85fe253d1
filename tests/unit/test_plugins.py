"""Finding, asking and choosing plugins: every refusal keeps its reason, one broken plugin hides nobody."""

from __future__ import annotations

import textwrap
import time
from pathlib import Path

import pluggy
import pytest

from tokenplane_core.backend import choice, plugins
from tokenplane_core.backend.errors import BackendNotFound, BackendUnavailable, ContractViolation
from tokenplane_core.backend.hookspecs import hookimpl
from tokenplane_core.backend.records import CONTRACT_VERSION, DetectReport, LoadOptions, ModelSpec
from tokenplane_core.kit.runner import LocalEngine
from tokenplane_core.kit.simulated import SimulatedCuda, oracle

MODEL = ModelSpec("m", "", None, "", {}, 1, 1, 1, 8, 89, 256, "float32")

SOUND = """
    import os
    from dataclasses import replace
    from tokenplane_core.backend.hookspecs import hookimpl
    from tokenplane_core.backend.records import DetectReport
    from tokenplane_core.kit.simulated import SimulatedCuda

    class Plugin(SimulatedCuda):
        @hookimpl
        def detect(self):
            {body}
"""


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: str) -> None:
    """Put a plugin distribution on the path, for this process and its children."""
    module = f"plugin_{name}"
    (folder / f"{module}.py").write_text(textwrap.dedent(code))
    info = folder / f"tokenplane_{name}-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: tokenplane-{name}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(f"[{plugins.GROUP}]\n{name} = {module}:Plugin\n")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder))


def sound(body: str) -> str:
    return SOUND.replace("{body}", body)


GOOD = sound("return DetectReport('found', (replace(self._device(), score=7, name='card of ' + str(os.getpid())),))")


def test_a_found_plugin_answers_with_version_contract_and_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, "good", GOOD)
    answer = plugins.ask("good")
    assert (answer.distribution, answer.version, answer.contract) == ("tokenplane-good", "1.2", CONTRACT_VERSION)
    assert answer.report.status == "found" and answer.report.devices[0].score == 7


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import no_such_library", "No module named 'no_such_library'"),
        ("class Plugin: pass", "written for contract of no version"),
        (sound("raise RuntimeError('driver too old')"), "detect() raised RuntimeError: driver too old"),
        (sound("os.kill(os.getpid(), 11)"), "detect() died of signal 11"),
        (sound("os._exit(3)"), "detect() ended with status 3"),
        (sound("import time; time.sleep(60)"), "gave no answer within 2 s"),
        (sound("return 5"), "detect returned int, the contract says DetectReport"),
        (sound("return DetectReport('found')"), "says found with 0 devices"),
        (sound("return DetectReport('perhaps')"), "breaks the contract"),
        (sound("return DetectReport('found', (replace(self._device(), score='high'),))"), "breaks the contract"),
        (sound("import sys; sys.stdout.buffer.write(bytes([255])); os._exit(4)"), "detect() ended with status 4"),
    ],
)
def test_a_broken_plugin_keeps_its_reason(
    code: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, "broken", code)
    report = plugins.ask("broken", timeout_s=2).report
    assert report.status == "broken"
    assert reason in report.reason


def test_a_chatty_library_does_not_spoil_the_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(
        tmp_path,
        monkeypatch,
        "chatty",
        sound("print('vendor banner', end=''); return DetectReport('absent', reason='no card')"),
    )
    assert plugins.ask("chatty").report == DetectReport("absent", reason="no card")


def test_a_reason_with_odd_line_breaks_arrives_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, "odd", sound("return DetectReport('absent', reason='one\\u2028two\\x85three')"))
    assert plugins.ask("odd").report.reason == "one\u2028two\x85three"


def test_what_a_hanging_detect_started_ends_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pid_file = tmp_path / "pid"
    start = "import subprocess; child = subprocess.Popen(['sleep', '60'])"
    note = f"open({str(pid_file)!r}, 'w').write(str(child.pid))"
    install(tmp_path, monkeypatch, "hanging", sound(f"{start}; {note}; child.wait()"))
    assert plugins.ask("hanging", timeout_s=3).report.status == "broken"
    stat = Path(f"/proc/{pid_file.read_text()}/stat")
    end_s = time.monotonic() + 5
    while stat.exists() and stat.read_text().split()[2] != "Z":
        assert time.monotonic() < end_s, "the child of detect() lives on"
        time.sleep(0.05)


def test_one_broken_plugin_hides_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, "good", GOOD)
    install(tmp_path, monkeypatch, "bad", "raise SystemError('half installed')")
    answers = {answer.name: answer for answer in plugins.survey()}
    assert answers["good"].report.status == "found"
    assert "half installed" in answers["bad"].report.reason
    assert {"simulated-cuda", "simulated-neuron"} <= set(answers)


def test_an_unknown_name_lists_what_is_installed_and_a_close_match() -> None:
    with pytest.raises(BackendNotFound, match="did you mean simulated-tpu") as caught:
        choice.choose("simulated-tpi")
    assert "simulated-gaudi" in str(caught.value)


def test_a_named_backend_works_or_fails_with_its_own_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, "shy", sound("return DetectReport('absent', reason='/dev/shy0 is missing')"))
    with pytest.raises(BackendUnavailable, match="backend shy is absent: /dev/shy0 is missing"):
        choice.choose("shy")
    assert choice.choose("simulated-cuda").report.devices[0].name == "simulated-cuda"


class Misspelt(SimulatedCuda):
    @hookimpl
    def prefil(self, batch: object) -> None: ...


class WrongArgument(SimulatedCuda):
    @hookimpl
    def kv_alloc(self, plan: object) -> bool:
        return True


class NoDecode:
    contract = CONTRACT_VERSION

    @hookimpl
    def detect(self) -> DetectReport:
        return DetectReport("absent", reason="-")


class FromTheFuture(SimulatedCuda):
    contract = "9.0"


@pytest.mark.parametrize(
    ("plugin", "reason"),
    [
        (Misspelt, "prefil"),
        (WrongArgument, "plan"),
        (NoDecode, "does not implement load, kv_alloc, prefill, decode"),
        (FromTheFuture, "written for contract 9.0, this core speaks"),
    ],
)
def test_a_plugin_that_breaks_the_contract_is_refused(plugin: type, reason: str) -> None:
    with pytest.raises(ContractViolation, match=reason):
        plugins.Backend("acme", plugin())


class Terse(SimulatedCuda):
    """Hooks may take fewer arguments than the spec offers."""

    @hookimpl
    def load(self, model: ModelSpec) -> object:
        return SimulatedCuda.load(self, model, LoadOptions())


def test_hooks_may_take_fewer_arguments() -> None:
    assert LocalEngine(Terse, MODEL).generate([[1, 2]], 3) == [oracle([1, 2], 3, 89)]


class Watcher:
    """An observer: sees every decode step, changes nothing."""

    def __init__(self) -> None:
        self.num_steps = 0

    @pluggy.HookimplMarker("tokenplane")(wrapper=True)
    def decode(self, batch: object):  # type: ignore[no-untyped-def]
        self.num_steps += 1
        return (yield)


def test_observers_wrap_steps() -> None:
    watcher = Watcher()
    engine = LocalEngine(SimulatedCuda, MODEL)
    engine.engine._backend = plugins.Backend("watched", SimulatedCuda(), [watcher])
    engine.engine._backend.load(MODEL, LoadOptions())
    engine.engine._backend.kv_alloc(engine.engine.layout)
    assert engine.generate([[1, 2]], 5) == [oracle([1, 2], 5, 89)]
    assert watcher.num_steps == 4
