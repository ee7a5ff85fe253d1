"""Turns what huggingface_hub raises into this package's errors."""

from __future__ import annotations

import errno

from huggingface_hub import get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tokenplane_core.backend.errors import ConfigError

from .errors import DiskFull, ModelGated, ModelNotFound, Transient
from .repo import Repo

MORE_ROOM = "Free some room, or set HF_HOME to a folder on a larger disk"

# By module, because the hub's client has used three HTTP libraries over the versions that are allowed.
_NETWORK_MODULES = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "hf_xet")


def explain(repo: Repo, error: Exception) -> Exception:
    """The error for the user; `Transient` if trying again may help; `error` itself if it is none of the hub's."""
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    match error:
        case OfflineModeIsEnabled():
            return ModelNotFound(
                f"HF_HUB_OFFLINE is set and {repo} is not complete in the cache {repo.cache_dir}. Download it once"
                " without HF_HUB_OFFLINE, or give the path of a local folder"
            )
        case GatedRepoError() | RepositoryNotFoundError():
            return _explain_access(repo, error)
        case RevisionNotFoundError():
            return ModelNotFound(
                f"{repo.kind} {repo.model_id!r} has no revision {repo.revision!r}; give a branch, tag or commit from"
                f" {repo.endpoint}/{repo.model_id}/commits"
            )
        case HFValidationError():
            return ModelNotFound(
                f"{repo.model_id!r} is neither an existing folder nor a model id like organisation/name: {error}"
            )
        case HfHubHTTPError():
            return _explain_status(repo, error)
        case OSError() if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return DiskFull(f"the disk of {repo.cache_dir} became full while downloading {repo}. {MORE_ROOM}")
        case PermissionError():
            return ConfigError(
                f"cannot write to the model cache {repo.cache_dir}: {error}. Set HF_HOME to another folder"
            )
        case _ if _is_network_failure(error):
            return Transient(f"{repo.endpoint} cannot be reached ({type(error).__name__}: {_first_line(error)})")
    return error


def _explain_access(repo: Repo, error: RepositoryNotFoundError) -> Exception:
    has_token = bool(repo.token or get_token())
    if isinstance(error, GatedRepoError):
        next_step = (
            "the account of the token that was sent has no access yet"
            if has_token
            else "then set HF_TOKEN to a token of that account"
        )
        return ModelGated(f"{repo} is gated: accept its terms at {repo.endpoint}/{repo.model_id}; {next_step}")
    next_step = "check that the token that was sent may read it" if has_token else "set HF_TOKEN to a token that may"
    return ModelNotFound(
        f"{repo.endpoint} has no {repo.kind} {repo.model_id!r}. Check the spelling (organisation/name); if it is"
        f" private, {next_step}"
    )


def _explain_status(repo: Repo, error: HfHubHTTPError) -> Exception:
    status = error.response.status_code
    if status in (408, 429) or status >= 500:
        return Transient(f"{repo.endpoint} answered with status {status}")
    if status == 401:
        return ModelNotFound(f"{repo.endpoint} does not accept the token that was sent for {repo}; check HF_TOKEN")
    return ModelNotFound(f"{repo.endpoint} refuses {repo} with status {status}: {_first_line(error)}")


def _is_network_failure(error: Exception) -> bool:
    if isinstance(error, ConnectionError | TimeoutError | LocalEntryNotFoundError):
        return True
    # A file that arrived with another size than was announced.
    if isinstance(error, OSError) and "Consistency check failed" in str(error):
        return True
    return any(base.__module__.partition(".")[0] in _NETWORK_MODULES for base in type(error).__mro__)


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line), "no message")
