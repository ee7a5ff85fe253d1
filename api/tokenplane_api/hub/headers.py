"""The headers of weight files on the hub, without the weights: a few kilobytes of each file."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

from tokenplane_core.weight_files import StoredTensor

from .errors import HubUnreachable, NoSafetensors, Transient
from .explain import explain
from .progress import silence_progress_bars
from .repo import WEIGHTS, Repo


def remote_tensors(
    model_id: str, revision: str | None = None, *, cache_dir: Path | None = None, endpoint: str | None = None
) -> list[StoredTensor]:
    """What the model's weight files hold, asked from the hub.

    Raises:
        ModelNotFound, ModelGated, HubUnreachable, NoSafetensors: all of them `ConfigError`s.
    """
    repo = Repo(
        model_id=model_id,
        revision=revision,
        token=None,
        cache_dir=cache_dir or Path(constants.HF_HUB_CACHE),
        endpoint=(endpoint or constants.ENDPOINT).rstrip("/"),
        patterns=(WEIGHTS,),
    )
    silence_progress_bars()
    try:
        return repo.tensors()
    except (NotASafetensorsRepoError, SafetensorsParsingError) as error:
        raise NoSafetensors(f"{repo} has no safetensors weights that can be read: {error}") from error
    except Exception as error:
        explained = explain(repo, error)
        if isinstance(explained, Transient):
            explained = HubUnreachable(f"{explained}. Check the network, or give the path of a local folder")
        raise explained from error
