"""What can go wrong on the way to a model. Each message is a sentence for the user, with the next step."""

from __future__ import annotations

from tokenplane_core.backend.errors import ConfigError


class ModelNotFound(ConfigError):
    """No such folder, repository or revision, or nothing of it here while the hub cannot be asked."""


class ModelGated(ConfigError):
    """The repository exists, but this account has not been let in."""


class HubUnreachable(ConfigError):
    """The network or the hub failed, again and again."""


class DiskFull(ConfigError):
    """The cache folder cannot take the model."""


class NoSafetensors(ConfigError):
    """The model has no weights that are safe to load, or not all of them."""


class Transient(Exception):
    """May work the next time. Says what happened; never leaves this package."""
