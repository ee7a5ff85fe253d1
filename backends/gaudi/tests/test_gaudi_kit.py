"""The plugin keeps the laws of the conformance kit, over the stand-in for Intel's bridge."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from habana_stand_in import StandInBackend

from tokenplane_core.backend.records import ModelSpec
from tokenplane_core.kit.checkpoint import reference_greedy
from tokenplane_core.kit.laws import LAWS, NotApplicable, Subject


@pytest.mark.parametrize("law_name", LAWS)
def test_the_law_is_kept(law_name: str, model: ModelSpec, folder: Path) -> None:
    try:
        LAWS[law_name](Subject("gaudi", StandInBackend, model, partial(reference_greedy, folder)))
    except NotApplicable as reason:
        pytest.skip(str(reason))
