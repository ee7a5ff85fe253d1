"""A plugin written for an earlier minor version of the contract serves on; one of another major version is refused."""

from __future__ import annotations

import inspect
import json
import zipfile
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from helpers.packages import judged
from tokenplane_core.backend import records
from tokenplane_core.backend.errors import ContractViolation
from tokenplane_core.backend.hookspecs import REQUIRED_HOOKS, BackendHooks
from tokenplane_core.backend.plugins import Backend
from tokenplane_core.backend.records import CONTRACT_VERSION
from tokenplane_core.kit.laws import LAWS
from tokenplane_core.kit.simulated import SimulatedCuda

# examples/acme-backend as a vendor built it when the contract was at 0.1, and what that contract was. They stay as they
# are; with the next minor version, the example built before it comes beside them.
WHEEL = Path(__file__).parent / "previous" / "tokenplane_acme-0.1.0-py3-none-any.whl"
PREVIOUS = json.loads((Path(__file__).parent / "previous" / "contract_0_1.json").read_text())
CAME_LATER = ("prompt_logprobs_", "prompt_top_", "adapters_", "speculation_")  # laws of claims that it cannot make
MAJOR, MINOR = map(int, CONTRACT_VERSION.split("."))


def test_the_example_built_against_the_previous_minor_version_still_passes(tmp_path: Path) -> None:
    report, _ = judged(WHEEL, "acme", tmp_path)
    assert report.contract == f"{MAJOR}.{MINOR - 1}" and report.core_contract == CONTRACT_VERSION
    expected = {law: "skipped" if law.startswith(CAME_LATER) else "passed" for law in LAWS}
    assert {law.law: law.outcome for law in report.laws} == expected


def test_that_example_uses_nothing_that_came_later() -> None:
    with zipfile.ZipFile(WHEEL) as wheel:
        code = "".join(wheel.read(name).decode() for name in wheel.namelist() if name.endswith(".py"))
    assert f'contract = "{PREVIOUS["version"]}"' in code
    later = {
        field.name
        for name, before in PREVIOUS["records"].items()
        for field in fields(getattr(records, name))
        if field.name not in before
    }
    assert later, "nothing was added: then the version should not have changed"
    assert not [name for name in later if f"{name}=" in code]


@pytest.mark.parametrize("name", PREVIOUS["records"])
def test_a_record_has_only_gained_fields_with_a_default(name: str) -> None:
    before: list[str] = PREVIOUS["records"][name]
    now = {field.name: field for field in fields(getattr(records, name))}
    assert [field for field in now if field in before] == before, "a field is gone, or has moved"
    added = [field for field_name, field in now.items() if field_name not in before]
    assert not [f.name for f in added if f.default is MISSING and f.default_factory is MISSING]


@pytest.mark.parametrize("name", PREVIOUS["hooks"])
def test_a_hook_has_only_gained_arguments(name: str) -> None:
    now = list(inspect.signature(getattr(BackendHooks, name)).parameters)
    before: list[str] = PREVIOUS["hooks"][name]
    assert [argument for argument in now if argument in before] == before


def test_no_hook_has_become_required_and_no_feature_is_gone() -> None:
    assert set(REQUIRED_HOOKS) <= set(PREVIOUS["required_hooks"])
    assert set(PREVIOUS["sampling_features"]) <= records.SAMPLING_FEATURES


@pytest.mark.parametrize("version", [f"{MAJOR + 1}.0", f"{MAJOR}.{MINOR + 1}", f"{MAJOR}.{MINOR + 10}", "", "0", "new"])
def test_another_major_version_or_a_newer_minor_one_is_refused_by_name(version: str) -> None:
    class Other(SimulatedCuda):
        contract = version

    with pytest.raises(ContractViolation) as caught:
        Backend("acme", Other())
    assert "backend acme was written for contract" in str(caught.value)
    assert (version or "of no version") in str(caught.value) and CONTRACT_VERSION in str(caught.value)


@pytest.mark.parametrize("minor", range(MINOR + 1))
def test_every_minor_version_up_to_now_is_accepted(minor: int) -> None:
    class Older(SimulatedCuda):
        contract = f"{MAJOR}.{minor}"

    assert Backend("acme", Older()).detect().status == "found"
