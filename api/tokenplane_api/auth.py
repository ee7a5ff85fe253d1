"""API keys: some secrets, compared in constant time, before anything of the request is read.

A file of keys is read again when it changes. If it has become unusable that is logged, and the keys stay as they were.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
from pathlib import Path
from time import monotonic

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from tokenplane_core.backend.errors import ConfigError

from .errors import UNAUTHORIZED, ApiError, error_response

log = logging.getLogger("tokenplane.keys")

LOOK_EVERY_S = 1.0

_OPEN_GETS = frozenset(
    {"/", "/health", "/live", "/ping", "/metrics", "/info", "/v2/health/live", "/v2/health/ready"}
    | {"/docs", "/docs/", "/openapi.json", "/api-doc/openapi.json"}
)
"""What probes, scrapers, TGI's tools and readers of the documents get without a key."""


class ApiKeys:
    """All keys that open the server, each with a name for the log and for limits.

    Raises:
        ConfigError: the key is empty; the file cannot be read, holds no key, or one twice.
    """

    def __init__(self, key: str | None, file: Path | None = None) -> None:
        if key is not None and not key.strip():
            raise ConfigError("--api-key (API_KEY) is empty; leave it out to serve without a key")
        self._own = [] if key is None else [(_digest(key.strip().encode()), "api-key")]
        self._file = file
        self._stamp: tuple[int, int, int] | None = None
        self._looked_s = monotonic()
        self._keys = self._own
        if file is not None:
            self._stamp = _stamp(file)
            self._keys = self._own + _read(file)

    def __bool__(self) -> bool:
        return bool(self._keys)

    def name_of(self, given: bytes) -> str | None:
        """Whose key it is. Takes as long for a right one as for a wrong one."""
        self._look()
        digest, found = _digest(given), None
        for known, name in self._keys:
            if hmac.compare_digest(digest, known):
                found = name
        return found

    def reload(self) -> None:
        """Read the file again now."""
        if self._file is None:
            return
        try:
            self._stamp = _stamp(self._file)
            self._keys = self._own + _read(self._file)
        except ConfigError as error:
            log.error("%s; the %d keys from before stay valid", error, len(self._keys))
        else:
            log.info("%d API keys read from %s", len(self._keys) - len(self._own), self._file)

    def _look(self) -> None:
        """See whether the file has changed, at most once a second."""
        now_s = monotonic()
        if self._file is not None and now_s - self._looked_s >= LOOK_EVERY_S:
            self._looked_s = now_s
            try:
                changed = _stamp(self._file) != self._stamp
            except ConfigError:
                return  # being replaced, or lost: the keys stay
            if changed:
                self.reload()


def is_open(method: str, path: str, health_route: str | None) -> bool:
    """Whether a request needs no key."""
    return method in ("GET", "HEAD") and (path in _OPEN_GETS or path == health_route)


class RequireKey:
    """Pure ASGI middleware: every route but the open ones needs `Authorization: Bearer KEY`.

    health_route: one more path whose GET is open.
    """

    def __init__(self, app: ASGIApp, keys: ApiKeys, health_route: str | None = None) -> None:
        self._app = app
        self._keys = keys
        self._health_route = health_route

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or is_open(scope["method"], scope["path"], self._health_route):
            await self._app(scope, receive, send)
            return
        record = scope["tokenplane.record"]
        record.key_name = self._keys.name_of(_given_key(scope))
        if record.key_name is not None:
            await self._app(scope, receive, send)
            return
        record.error = ApiError(UNAUTHORIZED, "send the API key as `Authorization: Bearer KEY`", code="invalid_api_key")
        record.error.headers["www-authenticate"] = "Bearer"
        await error_response(scope["path"], record.error)(scope, receive, send)


def _given_key(scope: Scope) -> bytes:
    scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
    return given.strip().encode("latin-1") if scheme.lower() == "bearer" else b""


def _digest(key: bytes) -> bytes:
    """Of equal length for all keys, so that a comparison does not tell how long they are."""
    return hashlib.sha256(key).digest()


def _stamp(file: Path) -> tuple[int, int, int]:
    try:
        found = os.stat(file)
    except OSError as error:
        raise ConfigError(f"--api-key-file is {file}, which cannot be read: {error.strerror}") from error
    return found.st_mtime_ns, found.st_size, found.st_ino


def _read(file: Path) -> list[tuple[bytes, str]]:
    """One key for each line, optionally a name behind it; `#` begins a comment line."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"--api-key-file is {file}, which cannot be read: {error.strerror}") from error
    except UnicodeDecodeError:
        raise ConfigError(f"--api-key-file is {file}, which is not UTF-8 text") from None
    keys: dict[bytes, str] = {}
    for number, line in enumerate(lines, 1):
        words = line.split(maxsplit=1)
        if not words or words[0].startswith("#"):
            continue
        digest = _digest(words[0].encode())
        if digest in keys:
            raise ConfigError(f"--api-key-file {file} has the key of line {number} twice; remove one")
        keys[digest] = words[1].strip() if len(words) > 1 else f"line-{number}"
    if not keys:
        raise ConfigError(f"--api-key-file {file} holds no key; write one on each line")
    return list(keys.items())
