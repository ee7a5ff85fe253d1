"""The laws as pytest tests, one for each backend and law; collected by pytest_plugin.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tokenplane_core.backend.plugins import ask, load_plugin
from tokenplane_core.backend.records import Device, ModelSpec
from tokenplane_core.kit.checkpoint import CONFIG, write_tiny_llama
from tokenplane_core.kit.laws import LAWS, NotApplicable, Subject
from tokenplane_core.model import describe_model


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("backend_name", metafunc.config.getoption("--tokenplane-backend"), scope="module")
    metafunc.parametrize("law_name", LAWS)


@pytest.fixture(scope="module")
def subject(backend_name: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    answer = ask(backend_name)
    assert answer.report.status == "found", f"{backend_name} is {answer.report.status}: {answer.report.reason}"
    folder = request.config.getoption("--tokenplane-model")
    model = _model(Path(folder) if folder else None, tmp_path_factory, answer.report.devices[0])
    return Subject(backend_name, lambda: load_plugin(backend_name), model)


def _model(folder: Path | None, tmp_path_factory: pytest.TempPathFactory, device: Device) -> ModelSpec:
    """float32 where the device has it: the laws compare texts."""
    dtype = "float32" if "float32" in device.dtypes else device.dtypes[0]
    if folder is None:
        folder = write_tiny_llama(tmp_path_factory.mktemp("tiny-llama"))
        return describe_model(folder, dtype=dtype, max_model_tokens=int(str(CONFIG["max_position_embeddings"])))
    return describe_model(folder, dtype=dtype)


def test_law(subject: Subject, law_name: str) -> None:
    try:
        LAWS[law_name](subject)
    except NotApplicable as reason:
        pytest.skip(str(reason))
