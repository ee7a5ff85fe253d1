"""The API key: one secret, compared in constant time, before anything of the request is read."""

from __future__ import annotations

import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from .errors import UNAUTHORIZED, ApiError, error_response

_OPEN_GETS = frozenset({"/", "/health", "/live", "/ping", "/metrics", "/info"})
"""What probes, scrapers and TGI's tools read without a key."""


class ApiKey:
    """Pure ASGI middleware: every other route needs `Authorization: Bearer KEY`."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app = app
        self._key = key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._is_open(scope) or self._has_key(scope):
            await self._app(scope, receive, send)
            return
        error = ApiError(UNAUTHORIZED, "send the API key as `Authorization: Bearer KEY`", code="invalid_api_key")
        error.headers["www-authenticate"] = "Bearer"
        scope["tokenplane.record"].error = error
        await error_response(scope["path"], error)(scope, receive, send)

    def _is_open(self, scope: Scope) -> bool:
        return scope["path"] in _OPEN_GETS and scope["method"] in ("GET", "HEAD")

    def _has_key(self, scope: Scope) -> bool:
        scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode("latin-1"), self._key)
