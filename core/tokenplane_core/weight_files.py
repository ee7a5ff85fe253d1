"""What the weights of a model folder weigh, from the headers of its safetensors files.

Reads headers and the index, never a tensor. Knows no framework: this is the one reader of these headers.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .backend.errors import ConfigError, UnsupportedModel
from .backend.records import ModelSpec

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
INDEX = "model.safetensors.index.json"

_WIDE_FLOATS = {"F64", "F32", "F16", "BF16"}
_LAYER = re.compile(r"(?:\w*model\.)*layers\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One entry of a header, as the safetensors format spells it."""

    name: str
    dtype: str  # F32 BF16 F8_E4M3 I32 ...
    num_elements: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Weights:
    """The size of a model's weights for any serving dtype."""

    num_floats: int  # of two bytes and more: loaded as the serving dtype
    other_bytes: int  # everything else stays as it is stored
    source: str  # how this is known, for people

    def bytes_as(self, dtype: str) -> int:
        return self.num_floats * DTYPE_BYTES[dtype] + self.other_bytes


def read_weights(model: ModelSpec) -> Weights:
    """Weights of the model's folder: exact where its files are here, else as large as the index says.

    Raises:
        UnsupportedModel: a file is damaged.
        ConfigError: there is neither a weight file nor an index that states a total size.
    """
    folder = Path(model.path)
    files = weight_files(folder)
    if files and all(file.exists() for file in files):
        return count_weights(stored_tensors(folder), model, "the headers of the weight files")
    total_bytes = _index_bytes(folder / INDEX)
    if total_bytes is None:
        raise ConfigError(
            f"{model.model_id}: the size of its weights is unknown, because {folder} holds no *.safetensors file and no"
            f" {INDEX} with metadata.total_size; copy or download one of them"
        )
    source = "metadata.total_size of the index, as the files are not here"
    config = model.config.get("text_config") or model.config
    saved = str(config.get("dtype") or config.get("torch_dtype") or model.config.get("torch_dtype"))
    saved_bytes = DTYPE_BYTES.get(saved.removeprefix("torch."))
    if saved_bytes is None or "quantization_config" in model.config:
        return Weights(0, total_bytes, source)
    return Weights(total_bytes // saved_bytes, total_bytes % saved_bytes, source)


def count_weights(tensors: Iterable[StoredTensor], model: ModelSpec, source: str) -> Weights:
    """Add up the tensors that get loaded.

    Not loaded: layers behind the last of the config (heads that predict further tokens, as DeepSeek and GLM store
    them), and an output layer that the config ties to the embedding.
    """
    tied = bool((model.config.get("text_config") or model.config).get("tie_word_embeddings"))
    num_floats = other_bytes = 0
    for tensor in tensors:
        layer = _LAYER.match(tensor.name)
        if (layer and int(layer[1]) >= model.num_layers) or (tied and tensor.name == "lm_head.weight"):
            continue
        if tensor.dtype in _WIDE_FLOATS:
            num_floats += tensor.num_elements
        else:
            other_bytes += tensor.num_bytes
    return Weights(num_floats, other_bytes, source)


def stored_weights_bytes(model: ModelSpec) -> int:
    """Memory of the weights in the folder's files: floats of two bytes and more as `model.dtype`, the rest as stored.

    Raises:
        UnsupportedModel: a file is missing or damaged.
    """
    return count_weights(stored_tensors(Path(model.path)), model, "").bytes_as(model.dtype)


def weight_files(folder: Path) -> list[Path]:
    """The files transformers would read; some folders hold the same weights a second time in another layout.

    Raises:
        UnsupportedModel: the index is damaged.
    """
    index = folder / INDEX
    try:
        return sorted({folder / name for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except FileNotFoundError:
        single = folder / "model.safetensors"
        return [single] if single.exists() else sorted(folder.glob("*.safetensors"))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UnsupportedModel(f"{index} is damaged: {_reason(error)}") from error


def stored_tensors(folder: Path) -> Iterator[StoredTensor]:
    """The headers of the weight files: a length (u64, little endian), then JSON.

    Raises:
        UnsupportedModel: a file is missing or damaged; names it.
    """
    for file in weight_files(folder):
        if not file.exists():
            raise UnsupportedModel(f"{file} is missing, though the index beside it names it; download the model again")
        with file.open("rb") as stream:
            try:
                header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
                header.pop("__metadata__", None)
                tensors = [_tensor(name, entry) for name, entry in header.items()]
            except (ValueError, MemoryError, OverflowError, KeyError, TypeError, AttributeError) as error:
                raise UnsupportedModel(f"{file} is not a safetensors file: {_reason(error)}") from error
        yield from tensors


def _tensor(name: str, entry: dict[str, Any]) -> StoredTensor:
    start, end = entry["data_offsets"]
    return StoredTensor(name, entry["dtype"], math.prod(entry["shape"]), end - start)


def _index_bytes(index: Path) -> int | None:
    try:
        size = json.loads(index.read_text(encoding="utf-8"))["metadata"]["total_size"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return int(size) if isinstance(size, int | float) and size > 0 else None


def _reason(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
