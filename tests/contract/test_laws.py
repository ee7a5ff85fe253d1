"""Every backend that runs here keeps the laws of the conformance kit."""

from __future__ import annotations

import pytest

from tokenplane_core.kit import suite
from tokenplane_core.kit.laws import LAWS, Subject

BACKENDS = ("cpu", "simulated-cuda", "simulated-tpu", "simulated-gaudi", "simulated-neuron")


@pytest.fixture(scope="module", params=BACKENDS)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return suite.make_subject(request.param, None, tmp_path_factory.mktemp("tiny-llama"))


@pytest.mark.parametrize("law_name", LAWS)
def test_backend_keeps(subject: Subject, law_name: str) -> None:
    suite.test_law(subject, law_name)
