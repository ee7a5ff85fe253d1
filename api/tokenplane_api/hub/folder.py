"""Is this folder a model? Answers from file names, and from the index of the weights."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenplane_core.adapter_files import CONFIG, WEIGHTS

from .errors import ModelNotFound, NoSafetensors

_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


def model_sha(folder: Path) -> str | None:
    """The commit of a folder in the hub cache; None for any other folder."""
    return folder.name if folder.parent.name == "snapshots" else None


def check_model_folder(folder: Path, needs_weights: bool = True) -> Path:
    """Return `folder` if it holds a model; weights are looked for by name only.

    Raises:
        ModelNotFound: there is no such folder, or it is no model's.
        NoSafetensors: it has no *.safetensors, or not all that its index names.
    """
    if not folder.is_dir():
        kind = "is a file, not a folder" if folder.exists() else "does not exist"
        raise ModelNotFound(
            f"model folder {folder} {kind}; give a folder with config.json, or a model id like org/name"
        )
    names = {file.name for file in folder.iterdir()}
    check_names(str(folder), names, needs_weights)
    if needs_weights:
        _check_shards(folder, names)
    return folder


def check_names(where: str, names: Iterable[str], needs_weights: bool = True) -> None:
    """Raises ModelNotFound or NoSafetensors if `where`, with these files, is no model."""
    names = sorted(names)
    if "config.json" not in names:
        if "adapter_config.json" in names:
            raise ModelNotFound(f"{where} is a LoRA adapter, not a model; serve the base model that it names")
        raise ModelNotFound(f"{where} has no config.json: not a model in the Hugging Face layout")
    if not needs_weights or any(name.endswith(".safetensors") for name in names):
        return
    pickles = [name for name in names if name.endswith(_PICKLE_SUFFIXES)]
    if pickles:
        raise NoSafetensors(
            f"{where} has its weights only as pickle ({', '.join(pickles[:3])}), which can run any code and is not"
            " loaded. Convert them to safetensors, for example with transformers: from_pretrained, save_pretrained"
        )
    raise NoSafetensors(f"{where} has no *.safetensors weights, only {', '.join(names)}")


ADAPTER_FILES = (CONFIG, WEIGHTS)


def check_adapter_folder(folder: Path) -> Path:
    """Return `folder` if it holds a LoRA adapter, by the names of its files. Raises ModelNotFound."""
    if not folder.is_dir():
        kind = "is a file, not a folder" if folder.exists() else "does not exist"
        raise ModelNotFound(f"adapter folder {folder} {kind}; give a folder with {CONFIG}, or an id like org/name")
    check_adapter_names(str(folder), [file.name for file in folder.iterdir()])
    return folder


def check_adapter_names(where: str, names: Iterable[str]) -> None:
    """Raises ModelNotFound if `where`, with these files, is no adapter."""
    if missing := [name for name in ADAPTER_FILES if name not in names]:
        raise ModelNotFound(
            f"{where} has no {missing[0]}: not a LoRA adapter as the peft library writes one"
            " (save_pretrained, with safetensors)"
        )


def _check_shards(folder: Path, names: set[str]) -> None:
    wanted = {name for name in names if name.endswith(".safetensors")}
    for index in sorted(name for name in names if name.endswith(".safetensors.index.json")):
        try:
            wanted |= set(json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise NoSafetensors(f"{folder / index} cannot be read: {error!r}") from error
    if missing := sorted(wanted - names):
        raise NoSafetensors(
            f"{folder} lacks {len(missing)} of the {len(wanted)} weight files that its index names,"
            f" {missing[0]} for one; copy or download them again"
        )
    for name in sorted(wanted):
        with (folder / name).open("rb") as file:
            if file.read(20) == b"version https://git-":
                raise NoSafetensors(f"{folder / name} is only a git-lfs pointer; run 'git lfs pull' in {folder}")
