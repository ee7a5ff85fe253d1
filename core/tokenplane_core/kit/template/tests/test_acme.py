"""What only this package can show. Its texts are judged by `pytest --tokenplane-backend acme`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tokenplane_core.backend.errors import UnsupportedModel
from tokenplane_core.backend.plugins import ask, open_backend
from tokenplane_core.backend.records import LoadOptions
from tokenplane_core.kit.checkpoint import write_tiny_llama
from tokenplane_core.model import describe_model


def test_it_is_installed_and_finds_its_device() -> None:
    answer = ask("acme")
    assert answer.report.status == "found", answer.report.reason
    assert answer.report.devices[0].kind == "acme"


def test_a_model_it_cannot_run_is_refused_with_a_sentence(tmp_path: Path) -> None:
    model = describe_model(write_tiny_llama(tmp_path))
    with pytest.raises(UnsupportedModel, match="MambaForCausalLM"):
        open_backend("acme").load(replace(model, architecture="MambaForCausalLM"), LoadOptions())
