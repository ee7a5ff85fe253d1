"""The way from a model id to a folder: local or cached if possible, downloaded and tried again otherwise."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled, RevisionNotFoundError

from .errors import DiskFull, HubUnreachable, Transient
from .explain import MORE_ROOM, explain
from .folder import ADAPTER_FILES, check_adapter_folder, check_adapter_names, check_model_folder, check_names
from .progress import Progress, ProgressLines, format_size, silence_progress_bars
from .repo import CODE, FILES, WEIGHTS, Repo, is_excluded


def resolve_model(
    model_id: str,
    revision: str | None = None,
    *,
    token: str | None = None,
    cache_dir: Path | None = None,
    endpoint: str | None = None,
    needs_weights: bool = True,
    trust_remote_code: bool = False,
    progress: Progress = print,
    retry_delays_s: Sequence[float] = (1, 2, 4, 8),
) -> Path:
    """The folder that holds the model, downloaded if need be.

    A `model_id` that is an existing path, or starts with `/`, `./`, `../` or `~`, is local. token, cache_dir and
    endpoint: instead of what huggingface_hub's variables say (HF_TOKEN, HF_HOME or HF_HUB_CACHE, HF_ENDPOINT;
    HF_HUB_OFFLINE counts too). needs_weights: False for devices that compute nothing; then none are downloaded.
    trust_remote_code: download the repository's Python files too. progress gets one line at a time, some from
    another thread. retry_delays_s: pauses before each new attempt after a network failure.

    A download that breaks off goes on inside a file while this runs, and in the next run with the files missing.

    Changes:
        Writes into the hub cache; what is complete there stays if this fails. Turns huggingface_hub's progress bars
        off, unless HF_HUB_DISABLE_PROGRESS_BARS says otherwise.
    Raises:
        ModelNotFound, ModelGated, HubUnreachable, DiskFull, NoSafetensors: all of them `ConfigError`s.
    """
    if (path := _local(model_id, revision, progress)) is not None:
        return check_model_folder(path, needs_weights)
    repo = Repo(
        model_id=model_id,
        revision=revision,
        token=token,
        cache_dir=cache_dir or Path(constants.HF_HUB_CACHE),
        endpoint=(endpoint or constants.ENDPOINT).rstrip("/"),
        patterns=(*FILES, *([WEIGHTS] if needs_weights else []), *([CODE] if trust_remote_code else [])),
    )
    silence_progress_bars()
    return check_model_folder(_fetch_patiently(repo, progress, retry_delays_s), needs_weights)


def resolve_adapter(
    adapter_id: str,
    revision: str | None = None,
    *,
    token: str | None = None,
    cache_dir: Path | None = None,
    endpoint: str | None = None,
    progress: Progress = print,
    retry_delays_s: Sequence[float] = (1, 2, 4, 8),
) -> Path:
    """The folder that holds a LoRA adapter; arguments, changes and errors as of `resolve_model`."""
    if (path := _local(adapter_id, revision, progress)) is not None:
        return check_adapter_folder(path)
    repo = Repo(
        model_id=adapter_id,
        revision=revision,
        token=token,
        cache_dir=cache_dir or Path(constants.HF_HUB_CACHE),
        endpoint=(endpoint or constants.ENDPOINT).rstrip("/"),
        patterns=ADAPTER_FILES,
        kind="adapter",
    )
    silence_progress_bars()
    return check_adapter_folder(_fetch_patiently(repo, progress, retry_delays_s))


def _local(where: str, revision: str | None, progress: Progress) -> Path | None:
    """The path, if it is one and no id."""
    path = Path(where).expanduser()
    if not (path.exists() or where.startswith(("/", "./", "../", "~"))):
        return None
    if revision is not None:
        progress(f"revision {revision!r} is ignored: {path} is a local folder")
    return path


def _fetch_patiently(repo: Repo, progress: Progress, retry_delays_s: Sequence[float]) -> Path:
    for attempt, delay_s in enumerate(retry_delays_s, start=2):
        try:
            return _fetch(repo, progress)
        except Transient as error:
            progress(f"{error}; attempt {attempt} of {len(retry_delays_s) + 1} in {delay_s:g} s")
            time.sleep(delay_s)
    try:
        return _fetch(repo, progress)
    except Transient as error:
        raise HubUnreachable(
            f"{error}, and {repo} is not complete in the cache {repo.cache_dir}. Check the network, HTTPS_PROXY and"
            " HF_ENDPOINT, or give the path of a local folder"
        ) from error


def _fetch(repo: Repo, progress: Progress) -> Path:
    try:
        info = repo.info()
    except Exception as error:
        return _from_cache(repo, error, progress)
    names = [file.rfilename for file in info.siblings or [] if not is_excluded(file.rfilename)]
    if repo.kind == "adapter":
        check_adapter_names(str(repo), names)
    else:
        check_names(str(repo), names, WEIGHTS in repo.patterns)
    missing_bytes = repo.missing_bytes(info)
    _check_disk(repo, missing_bytes)
    try:
        if missing_bytes == 0:
            return repo.snapshot()
        progress(f"downloading {repo} at commit {info.sha}: {format_size(missing_bytes)} into {repo.cache_dir}")
        started_s = time.monotonic()
        with ProgressLines(repo.blobs, missing_bytes, progress):
            folder = repo.snapshot()
        progress(f"downloaded {format_size(missing_bytes)} in {time.monotonic() - started_s:.1f} s")
        return folder
    except Exception as error:
        raise explain(repo, error) from error


def _from_cache(repo: Repo, error: Exception, progress: Progress) -> Path:
    """What the cache has, if the hub fails. A revision that the hub knows not to exist is not looked for."""
    explained = explain(repo, error)
    cached = None if isinstance(error, RevisionNotFoundError | HFValidationError) else repo.cached()
    if cached is None:
        raise explained from error
    if not isinstance(error, OfflineModeIsEnabled):
        progress(f"{explained}; going on with the copy in the cache, {cached}")
    return cached


def _check_disk(repo: Repo, needed_bytes: int) -> None:
    folder = next(folder for folder in (repo.cache_dir, *repo.cache_dir.absolute().parents) if folder.exists())
    free_bytes = shutil.disk_usage(folder).free
    if needed_bytes > free_bytes:
        raise DiskFull(
            f"{repo} needs {format_size(needed_bytes)}, but the disk of {repo.cache_dir} has only"
            f" {format_size(free_bytes)} free. {MORE_ROOM}"
        )
