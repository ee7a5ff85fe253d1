"""Every exception the core raises on purpose.

TokenplaneError
├── BackendError                 something about a plugin or its device
│   ├── BackendNotFound          no plugin of that name is installed
│   ├── BackendUnavailable       installed, but detect() says absent or broken; carries the reason
│   ├── ContractViolation        the plugin broke the contract (hook missing, wrong version, wrong output)
│   ├── UnsupportedModel         load(): this backend cannot run this model, and why
│   ├── UnsupportedAdapter       adapter_load(): this LoRA adapter does not fit the model, and why; all else serves on
│   ├── OutOfMemory              load() or kv_alloc(): does not fit; the plugin object may be closed and dropped
│   └── DeviceLost               during a step: device state unknown, the engine process must be replaced
├── ConfigError                  an option is out of range or contradicts another; names option, value and limit
└── RequestError                 one request cannot be served; never ends the engine
    ├── InvalidRequest           breaks a limit; names field, value and limit
    ├── QueueFull                too many requests wait or run already
    ├── ReaderTooSlow            its events pile up unread
    ├── EngineNotReady           the engine process is starting or restarting
    └── EngineFailed             the engine process died while it held this request
"""

from __future__ import annotations


class TokenplaneError(Exception):
    """Root of the tree in this module's docstring."""


class BackendError(TokenplaneError):
    pass


class BackendNotFound(BackendError):
    pass


class BackendUnavailable(BackendError):
    pass


class ContractViolation(BackendError):
    pass


class UnsupportedModel(BackendError):
    pass


class UnsupportedAdapter(BackendError):
    pass


class OutOfMemory(BackendError):
    pass


class DeviceLost(BackendError):
    pass


class ConfigError(TokenplaneError):
    pass


class RequestError(TokenplaneError):
    pass


class InvalidRequest(RequestError):
    """`field` is the request field at fault, in the core's words."""

    def __init__(self, message: str, field: str) -> None:
        super().__init__(message)
        self.field = field


class QueueFull(RequestError):
    """`retry_after_s` is a guess at when it is worth trying again."""

    def __init__(self, message: str, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ReaderTooSlow(RequestError):
    pass


class EngineNotReady(RequestError):
    pass


class EngineFailed(RequestError):
    pass


def revived(kind: str, message: str, otherwise: type[TokenplaneError]) -> TokenplaneError:
    """What another process raised, as the class of that name, or as `otherwise` where none takes a message alone."""
    found = globals().get(kind)
    if isinstance(found, type) and issubclass(found, TokenplaneError) and found is not InvalidRequest:
        return found(message)
    return otherwise(message)
