"""Choose a backend and one of its devices: what was asked for, or the best that can be used.

Nothing is ever replaced by something slower in silence: hardware that is broken, busy or without its plugin ends the
choice with an error that names it, and says how to go on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from .errors import BackendNotFound, BackendUnavailable, ConfigError
from .hardware import Hardware, without_plugin
from .plugins import PluginAnswer, ask, survey
from .probe import ACCELERATOR_SCORE, GIB
from .records import Device


def choose(name: str | None = None, timeout_s: float = 10.0) -> PluginAnswer:
    """The backend to serve with: the named one, or the best found.

    Raises:
        BackendNotFound: `name` is not installed, or nothing is.
        BackendUnavailable: the named one is absent or broken, nothing was found, or (unnamed) an accelerator is there
            that is broken, busy or without its plugin: serving from something slower would hide that.
    """
    if name is not None:
        answer = ask(name, timeout_s)
        if answer.report.status != "found":
            raise BackendUnavailable(f"backend {name} is {answer.report.status}: {answer.report.reason}")
        return answer
    answers = survey(timeout_s)
    return best(answers, missing_hardware(answers))


def missing_hardware(answers: Iterable[PluginAnswer], root: Path = Path("/")) -> list[Hardware]:
    """What is plainly there and nobody has answered for; a plugin of another name may serve the same kind of device."""
    answers = list(answers)
    kinds = {device.kind for answer in answers for device in answer.report.devices}
    return without_plugin(kinds | {answer.name for answer in answers}, root)


def best(answers: Iterable[PluginAnswer], missing: Iterable[Hardware] = ()) -> PluginAnswer:
    """The choice among answers when the user named no backend; raises as `choose` does.

    The highest score wins, then the most free memory. missing: hardware whose plugin is not installed.
    """
    answers = list(answers)
    lacking = [hardware for hardware in missing if hardware.is_accelerator]
    install = "".join(f"\n  {hardware.what}: {hardware.install}" for hardware in lacking)
    if not answers:
        cpu = 'for this machine\'s CPU: pip install "tokenplane[cpu]"'
        raise BackendNotFound(f"no backend plugin is installed; {cpu}{install}")
    found = sorted((answer for answer in answers if _best_rank(answer) > (0, 0)), key=_best_rank, reverse=True)
    named = f"--backend {found[0].name if found else 'NAME'}"
    if troubled := [answer for answer in answers if trouble(answer)]:
        names = ", ".join(answer.name for answer in troubled)
        reasons = "\n".join(f"  {answer.name}: {trouble(answer)}" for answer in troubled)
        raise BackendUnavailable(
            f"{names} cannot be used, and nothing else is chosen in its place:\n{reasons}\n"
            f"Repair or uninstall it, or choose a backend yourself: {named}"
        )
    if lacking and not (found and _best_rank(found[0])[0] >= ACCELERATOR_SCORE):
        raise BackendUnavailable(
            f"a plugin is missing for this machine's hardware, and nothing slower is chosen in its place:"
            f"{install}\nInstall it, or choose a backend yourself: {named}"
        )
    if not found:
        reasons = "\n".join(f"  {a.name}: {a.report.status}: {a.report.reason}" for a in answers if a.report.reason)
        raise BackendUnavailable(f"no installed backend found a device:\n{reasons}")
    return found[0]


def choose_device(answer: PluginAnswer, index: int | None = None) -> tuple[Device, str]:
    """The device to serve with, and why that one: the one the user named, or the best that is ok.

    Raises:
        ConfigError: the backend has no device of that index.
        BackendUnavailable: the named device is broken, or (unnamed) none is ok; says what each one has.
    """
    devices = answer.report.devices
    if index is None:
        if ok := usable(answer):
            return ok[0], _why(ok, devices)
        raise BackendUnavailable(f"backend {answer.name} has no device that can be used: {trouble(answer)}")
    for device in devices:
        if device.index == index:
            if device.state == "broken":
                raise BackendUnavailable(
                    f"--device-index is {index}, and {answer.name} device {index} is broken: {device.notes}"
                )
            return device, "as asked for" + (f", though it is busy: {device.notes}" if device.state == "busy" else "")
    numbers = ", ".join(str(device.index) for device in devices)
    raise ConfigError(
        f"--device-index is {index}, but {answer.name} has {len(devices)} device(s): {numbers}; `tokenplane devices`"
        " describes them"
    )


def _why(ok: Sequence[Device], devices: Sequence[Device]) -> str:
    """Why the first of the usable devices is chosen."""
    ranks = {_rank(device) for device in ok}
    if len(ok) == 1:
        why = "the only one"
    elif len(ranks) == 1:
        why = f"the first of {len(ok)} alike"
    elif len({score for score, _ in ranks}) == 1:
        why = f"the most free memory of {len(ok)}"
    else:
        why = f"the best of {len(ok)}"
    passed_over = [f"{device.index} is {device.state}" for device in devices if device.state != "ok"]
    return why + (f"; passed over: {', '.join(passed_over)}" if passed_over else "")


# --- What an answer is worth --------------------------------------------------------------------------------


def usable(answer: PluginAnswer) -> list[Device]:
    """The devices that may be chosen unasked, best first."""
    ok = [device for device in answer.report.devices if device.state == "ok"]
    return sorted(ok, key=lambda device: (*_rank(device), -device.index), reverse=True)


def _best_rank(answer: PluginAnswer) -> tuple[int, int]:
    """Of its best device, to be compared between backends; (0, 0): never chosen unasked."""
    return max((_rank(device) for device in usable(answer) if device.score > 0), default=(0, 0))


def _rank(device: Device) -> tuple[int, int]:
    """Score, then free memory in whole GiB: a few bytes do not decide between idle cards."""
    free_bytes = device.memory_total_bytes if device.memory_free_bytes is None else device.memory_free_bytes
    return device.score, free_bytes // GIB


def trouble(answer: PluginAnswer) -> str:
    """Why hardware that is there cannot be used; "" if some can, or if there is none."""
    if answer.report.status == "broken":
        return answer.report.reason
    if answer.report.status == "absent" or usable(answer):
        return ""
    return "; ".join(f"device {d.index} is {d.state}: {d.notes}" for d in answer.report.devices)
