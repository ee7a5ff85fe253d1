"""One model on the hub: all calls into huggingface_hub's API and cache. Raises what that library raises."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.hf_api import ModelInfo

from tokenplane_core.weight_files import StoredTensor

from .. import __version__

# Never pickle (*.bin, *.pt, *.pth): loading it runs whatever code it holds.
FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
WEIGHTS = "*.safetensors"
CODE = "*.py"
# Folders hold the same weights for other programs; so does consolidated.safetensors.
NOT_FILES = ("*/*", "consolidated*.safetensors")


@dataclass(frozen=True)
class Repo:
    """One model at one revision (None: the default branch), as one user sees it."""

    model_id: str
    revision: str | None
    token: str | None  # None: HF_TOKEN or the stored login
    cache_dir: Path
    endpoint: str
    patterns: tuple[str, ...]  # which files to have
    kind: Literal["model", "adapter"] = "model"

    def __str__(self) -> str:
        return f"{self.kind} {self.model_id!r}" + (f" (revision {self.revision!r})" if self.revision else "")

    @property
    def blobs(self) -> Path:
        """Where the cache keeps file contents, also those that are still arriving."""
        return self.cache_dir / f"models--{self.model_id.replace('/', '--')}" / "blobs"

    def info(self) -> ModelInfo:
        """Ask the hub for the commit, and the names and sizes of its files."""
        timeout_s = constants.HF_HUB_ETAG_TIMEOUT
        return self._api().model_info(self.model_id, revision=self.revision, files_metadata=True, timeout=timeout_s)

    def tensors(self) -> list[StoredTensor]:
        """Ask the hub for the headers of the weight files."""
        metadata = self._api().get_safetensors_metadata(self.model_id, revision=self.revision)
        return [
            StoredTensor(name, tensor.dtype, tensor.parameter_count, tensor.data_offsets[1] - tensor.data_offsets[0])
            for file in metadata.files_metadata.values()
            for name, tensor in file.tensors.items()
        ]

    def _api(self) -> HfApi:
        return HfApi(self.endpoint, token=self.token, library_name="tokenplane", library_version=__version__)

    def snapshot(self, only_cached: bool = False) -> Path:
        """The folder with the wanted files, after downloading what is missing (unless only_cached)."""
        folder = snapshot_download(
            self.model_id,
            revision=self.revision,
            cache_dir=self.cache_dir,
            token=self.token,
            endpoint=self.endpoint,
            library_name="tokenplane",
            library_version=__version__,
            allow_patterns=list(self.patterns),
            ignore_patterns=list(NOT_FILES),
            local_files_only=only_cached,
        )
        return Path(folder)

    def cached(self) -> Path | None:
        """The folder if the cache has it, as far as can be told without the hub."""
        try:
            return self.snapshot(only_cached=True)
        except LocalEntryNotFoundError:
            return None

    def missing_bytes(self, info: ModelInfo) -> int:
        """How much of the wanted files the cache lacks."""
        return sum(
            file.size or 0
            for file in info.siblings or []
            if _matches(file.rfilename, self.patterns)
            and not is_excluded(file.rfilename)
            and not isinstance(try_to_load_from_cache(self.model_id, file.rfilename, self.cache_dir, info.sha), str)
        )


def is_excluded(name: str) -> bool:
    """Whether the file is no part of the model, whatever else it is."""
    return _matches(name, NOT_FILES)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)
