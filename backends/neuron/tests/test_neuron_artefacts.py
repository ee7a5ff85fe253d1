"""Compiled graphs are kept, found again, and never trusted when they are not what they should be."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from neuron_stand_in import Bench, StandInBackend

from tokenplane_core.backend.artefacts import artefact, cache_folder
from tokenplane_core.backend.errors import BackendError
from tokenplane_core.backend.records import LoadOptions, ModelSpec
from tokenplane_core.kit.checkpoint import reference_greedy, write_tiny_llama
from tokenplane_core.kit.runner import LocalEngine
from tokenplane_core.model import describe_model


def only_entry(cache: Path) -> Path:
    (entry,) = cache.iterdir()
    return entry


def test_the_second_start_compiles_nothing(bench: Bench, cache: Path, model: ModelSpec) -> None:
    texts = [LocalEngine(lambda: StandInBackend(bench), model).generate([[1, 2, 3]], 5) for _ in range(2)]
    assert texts[0] == texts[1]
    names = ["context_encoding", "token_generation", "context_encoding_128", "context_encoding_256"]
    assert bench.exports == [names]
    entry = only_entry(cache)
    assert entry.name.startswith("llama-")
    assert sorted(file.name for file in entry.iterdir()) == [
        "config.json",
        "model.pt",
        "neuron_config.json",
        "tokenplane.json",
    ]
    assert cache.stat().st_mode & 0o077 == 0  # what lies here gets executed


def test_other_weights_of_the_same_model_share_the_graphs(bench: Bench, cache: Path, tmp_path: Path) -> None:
    for seed in (1, 2):
        folder = write_tiny_llama(tmp_path / str(seed), seed)
        engine = LocalEngine(lambda: StandInBackend(bench), describe_model(folder))
        assert engine.generate([[1, 2, 3]], 5) == [reference_greedy(folder, [1, 2, 3], 5)]
    assert len(bench.exports) == 1 and only_entry(cache)


def test_whatever_the_graphs_depend_on_makes_another_entry(bench: Bench, cache: Path, model: ModelSpec) -> None:
    def load(model: ModelSpec, **options: int) -> None:
        StandInBackend(bench).load(model, LoadOptions(**options))

    load(model)
    load(model, max_sequences=4)
    load(replace(model, max_model_tokens=256))
    load(replace(model, dtype="bfloat16"))
    load(replace(model, config={**model.config, "rope_theta": 5e5}))
    bench.cores = 4
    load(model)
    bench.compiler = "2.22.0"
    load(model)
    assert len(bench.exports) == len(list(cache.iterdir())) == 7
    load(model)
    assert len(bench.exports) == 7


def truncate(entry: Path) -> None:
    (entry / "model.pt").write_text((entry / "model.pt").read_text()[:-1])


def lose_a_file(entry: Path) -> None:
    (entry / "model.pt").unlink()


def add_a_file(entry: Path) -> None:
    (entry / "extra.so").write_text("")


def lose_the_manifest(entry: Path) -> None:
    (entry / "tokenplane.json").unlink()


def damage_the_manifest(entry: Path) -> None:
    (entry / "tokenplane.json").write_text("[]")


def take_another_setting(entry: Path) -> None:
    manifest = json.loads((entry / "tokenplane.json").read_text())
    manifest["facts"]["rows"] = 16
    (entry / "tokenplane.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, "model.pt is damaged"),
        (lose_a_file, "model.pt is missing"),
        (add_a_file, "extra.so is not part of it"),
        (lose_the_manifest, "tokenplane.json is missing or damaged"),
        (damage_the_manifest, "tokenplane.json is missing or damaged"),
        (take_another_setting, "made for another setting: rows is 16, needed is 8"),
    ],
)
def test_a_damaged_or_foreign_entry_is_refused(
    bench: Bench, plugin: StandInBackend, cache: Path, model: ModelSpec, damage: object, reason: str
) -> None:
    plugin.load(model, LoadOptions())
    damage(only_entry(cache))  # type: ignore[operator]
    with pytest.raises(BackendError) as refusal:
        plugin.load(model, LoadOptions())
    assert reason in str(refusal.value) and str(only_entry(cache)) in str(refusal.value)
    assert "Delete this folder" in str(refusal.value)
    assert len(bench.exports) == 1


def test_a_failed_compilation_leaves_nothing_behind(
    bench: Bench, plugin: StandInBackend, cache: Path, model: ModelSpec
) -> None:
    bench.export_error = RuntimeError("the compiler gave up")
    with pytest.raises(BackendError, match="load it: the compiler gave up"):
        plugin.load(model, LoadOptions())
    assert list(cache.iterdir()) == []
    bench.export_error = None
    plugin.load(model, LoadOptions())
    assert len(bench.exports) == 1


def test_of_two_processes_that_compile_at_once_the_first_one_stays(tmp_path: Path) -> None:
    facts = {"model_type": "llama", "rows": 8}

    def slower(folder: Path) -> None:
        (folder / "model.pt").write_text("second")
        artefact(tmp_path, "llama", facts, lambda other: (other / "model.pt").write_text("first") and None)

    folder = artefact(tmp_path, "llama", facts, slower)
    assert (folder / "model.pt").read_text() == "first"
    assert list(tmp_path.iterdir()) == [folder]


def test_a_cache_that_cannot_be_written_names_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BackendError, match="name a writable folder with TOKENPLANE_CACHE"):
        artefact(tmp_path / "file" / "neuron", "llama", {"model_type": "llama"}, lambda folder: None)


@pytest.mark.parametrize(
    ("environ", "folder"),
    [
        ({"TOKENPLANE_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a/neuron"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/tokenplane/neuron"),
        ({"XDG_CACHE_HOME": "relative"}, "~/.cache/tokenplane/neuron"),
        ({}, "~/.cache/tokenplane/neuron"),
    ],
)
def test_the_cache_lies_where_the_environment_says(environ: Mapping[str, str], folder: str) -> None:
    assert cache_folder("neuron", environ) == Path(folder).expanduser()
