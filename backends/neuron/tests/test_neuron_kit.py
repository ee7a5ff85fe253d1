"""The plugin keeps the laws of the conformance kit, over the stand-in for the vendor's runtime."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from neuron_stand_in import Bench, StandInBackend

from tokenplane_core.backend.records import ModelSpec
from tokenplane_core.kit.checkpoint import reference_greedy
from tokenplane_core.kit.laws import LAWS, Subject
from tokenplane_core.kit.suite import test_law as keep_law


@pytest.fixture(scope="module")
def subject(model: ModelSpec, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOKENPLANE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield Subject("neuron", lambda: StandInBackend(Bench()), model, partial(reference_greedy, folder))


@pytest.mark.parametrize("law_name", LAWS)
def test_neuron_keeps(subject: Subject, law_name: str) -> None:
    keep_law(subject, law_name)
