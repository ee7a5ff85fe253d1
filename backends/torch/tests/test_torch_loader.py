"""What loading refuses, and that it says why."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tokenplane_core.backend.errors import OutOfMemory, UnsupportedModel
from tokenplane_core.backend.records import ModelSpec
from tokenplane_core.model import describe_model
from tokenplane_torch.loader import load_model, stored_weights_bytes, weights_bytes
from tokenplane_torch.testing import PlainDevice, make_checkpoint


@pytest.fixture
def llama(tmp_path: Path) -> ModelSpec:
    return describe_model(make_checkpoint("llama", tmp_path / "llama"), model_id="acme/tiny")


def test_weights_arrive_in_the_dtype_asked_for(llama: ModelSpec) -> None:
    model = replace(llama, dtype="bfloat16")
    module = load_model(model, PlainDevice())
    assert module.dtype == torch.bfloat16 and not module.training
    stored = load_file(Path(llama.path) / "model.safetensors")
    assert torch.equal(module.lm_head.weight, stored["lm_head.weight"].bfloat16())
    parameters = sum(tensor.nbytes for tensor in module.parameters())
    assert stored_weights_bytes(model) == parameters
    assert parameters <= weights_bytes(module) < parameters + 1024  # and the rotary frequencies


def test_tied_weights_count_once(tmp_path: Path) -> None:
    model = describe_model(make_checkpoint("llama", tmp_path, tie_word_embeddings=True))
    module = load_model(model, PlainDevice())
    assert weights_bytes(module) < stored_weights_bytes(model) + 1024


def test_pickle_weights_are_refused_with_a_way_out(llama: ModelSpec) -> None:
    folder = Path(llama.path)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UnsupportedModel, match=r"acme/tiny.*pytorch_model\.bin.*convert them to safetensors"):
        load_model(llama, PlainDevice())


def test_a_folder_without_weights_is_refused(llama: ModelSpec) -> None:
    (Path(llama.path) / "model.safetensors").unlink()
    with pytest.raises(UnsupportedModel, match=r"holds no \*\.safetensors"):
        load_model(llama, PlainDevice())


def test_weights_that_do_not_fit_are_refused_before_they_are_read(llama: ModelSpec) -> None:
    with pytest.raises(OutOfMemory, match=r"acme/tiny: its weights need .* GiB as float32"):
        load_model(llama, PlainDevice(free_bytes=stored_weights_bytes(llama) - 1))


def test_weights_in_several_files_or_twice_in_the_folder_count_once(llama: ModelSpec) -> None:
    folder, whole = Path(llama.path), stored_weights_bytes(llama)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    parts = {f"model-0000{i}-of-00002.safetensors": dict(list(tensors.items())[i - 1 :: 2]) for i in (1, 2)}
    for name, part in parts.items():
        save_file(part, folder / name, metadata={"format": "pt"})
    weight_map = {key: name for name, part in parts.items() for key in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert stored_weights_bytes(llama) == whole
    assert torch.equal(load_model(llama, PlainDevice()).lm_head.weight, tensors["lm_head.weight"])
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UnsupportedModel, match=r"model-00002-of-00002\.safetensors is missing"):
        load_model(llama, PlainDevice())


def test_a_missing_weight_is_not_made_up(llama: ModelSpec) -> None:
    file = Path(llama.path) / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UnsupportedModel, match=r"lack 1 of the weights .* model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(llama, PlainDevice())


def test_a_weight_of_another_shape_is_refused(llama: ModelSpec) -> None:
    config = Path(llama.path) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"intermediate_size": 112}))
    with pytest.raises(UnsupportedModel, match=r"model type 'llama' is not supported"):
        load_model(llama, PlainDevice())


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"\x10\0\0\0\0\0\0\0not json at all!"])
def test_a_damaged_file_is_named(llama: ModelSpec, content: bytes) -> None:
    (Path(llama.path) / "model.safetensors").write_bytes(content)
    with pytest.raises(UnsupportedModel, match=r"model\.safetensors is not a safetensors file"):
        load_model(llama, PlainDevice())


def test_encoder_decoders_are_refused(llama: ModelSpec, tmp_path: Path) -> None:
    folder = make_checkpoint("t5", tmp_path / "t5")
    model = replace(llama, path=str(folder), config=json.loads((folder / "config.json").read_text()))
    with pytest.raises(UnsupportedModel, match=r"model type 't5' .* encoder-decoder"):
        load_model(model, PlainDevice())


def test_multimodal_models_are_refused(llama: ModelSpec, tmp_path: Path) -> None:
    transformers.Gemma3Config().save_pretrained(tmp_path / "gemma3")
    (tmp_path / "gemma3" / "model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    model = replace(llama, path=str(tmp_path / "gemma3"), config={"model_type": "gemma3"})
    with pytest.raises(UnsupportedModel, match=r"'gemma3' .* multimodal .*vision_config"):
        load_model(model, PlainDevice())


def test_code_in_the_model_folder_runs_only_when_asked_for(
    llama: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [*sys.path])
    folder = Path(llama.path)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "acme", "auto_map": {"AutoConfig": "acme.AcmeConfig", "AutoModelForCausalLM": "acme.Acme"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "acme.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class AcmeConfig(LlamaConfig):\n    model_type = 'acme'\n"
        "class Acme(LlamaForCausalLM):\n    config_class = AcmeConfig\n"
    )
    with pytest.raises(UnsupportedModel, match=r"needs Python code .* --trust-remote-code"):
        load_model(replace(llama, config=config), PlainDevice())
    module = load_model(replace(llama, config=config, trust_remote_code=True), PlainDevice())
    assert type(module).__name__ == "Acme"
