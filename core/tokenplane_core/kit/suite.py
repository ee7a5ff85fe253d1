"""The laws as pytest tests, one for each backend and law; collected by pytest_plugin.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tokenplane_core.backend.choice import choose_device
from tokenplane_core.backend.plugins import ask, load_plugin
from tokenplane_core.kit.adapters import greedy_with_adapter
from tokenplane_core.kit.checkpoint import reference_greedy, reference_logprobs, write_tiny_llama
from tokenplane_core.kit.laws import LAWS, NotApplicable, Subject
from tokenplane_core.kit.report import declared_facts
from tokenplane_core.kit.simulated import oracle, oracle_logprobs, oracle_with_adapter
from tokenplane_core.model import describe_model


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("backend_name", metafunc.config.getoption("--tokenplane-backend"), scope="module")
    metafunc.parametrize("law_name", LAWS)


@pytest.fixture(scope="module")
def subject(backend_name: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    folder = request.config.getoption("--tokenplane-model")
    return make_subject(backend_name, Path(folder) if folder else None, tmp_path_factory.mktemp("tiny-llama"))


def make_subject(backend_name: str, folder: Path | None, scratch: Path) -> Subject:
    """An installed backend with the model in `folder`, else with a tiny random Llama written to `scratch`.

    float32 where the device has it, since the laws compare texts.
    """
    answer = ask(backend_name)
    assert answer.report.status == "found", f"{backend_name} is {answer.report.status}: {answer.report.reason}"
    device, _ = choose_device(answer)
    dtype = "float32" if "float32" in device.dtypes else device.dtypes[0]
    model = describe_model(folder or write_tiny_llama(scratch), dtype=dtype)
    reference: Callable[[list[int], int], list[int]] | None = None
    logprobs: Callable[[list[int]], list[float]] | None = None
    with_adapter: Callable[[Path, list[int], int], list[int]] | None = None
    if device.kind == "simulated":
        reference = partial(oracle, vocab_size=model.vocab_size)
        logprobs = partial(oracle_logprobs, vocab_size=model.vocab_size)
        with_adapter = partial(oracle_with_adapter, model.vocab_size)
    elif folder is None and dtype == "float32":
        reference, logprobs = partial(reference_greedy, scratch), partial(reference_logprobs, scratch)
        with_adapter = partial(greedy_with_adapter, scratch)
    return Subject(
        backend_name, lambda: load_plugin(backend_name), model, reference, logprobs, with_adapter, device.index
    )


@pytest.fixture(autouse=True)
def _note_declared(subject: Subject, record_property: Callable[[str, Any], None]) -> Iterator[None]:
    """What load() declared goes into the report."""
    yield
    if subject.declared is not None:
        record_property("tokenplane-declared", declared_facts(subject.declared))


def test_law(subject: Subject, law_name: str) -> None:
    try:
        LAWS[law_name](subject)
    except NotApplicable as reason:
        pytest.skip(str(reason))
