"""Puts the application together: routes, middleware, error handlers and the engine's life."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import AsyncIterator

import msgspec
from fastapi import APIRouter, FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from tokenplane_core.backend.errors import ConfigError, RequestError
from tokenplane_core.client import EngineClient

from . import __version__, both_dialects, health, openapi
from .auth import ApiKeys, RequireKey, is_open
from .docs_page import render
from .errors import ApiError, ClientGone, as_api_error, describe_http_error, error_response
from .openai import adapter_routes
from .openai import routes as openai_routes
from .request_scope import RequestScope, record_of
from .service import Service
from .settings import Settings
from .text.chat_template import ChatTemplate
from .text.tokenizer import TextTokenizer
from .tgi import kserve
from .tgi import routes as tgi_routes
from .tracing import Tracing, start_tracing

log = logging.getLogger("tokenplane.server")

CLIENT_CLOSED_REQUEST = 499
"""What the log shows for a client that left; nobody receives it."""


def create_app(
    engine: EngineClient, tokenizer: TextTokenizer, chat_template: ChatTemplate | None, settings: Settings
) -> FastAPI:
    """The ASGI application over an engine that has not been started.

    Its lifespan starts the engine in the background and closes it; `app.state.service.starting()` tells how that went.

    Raises:
        ConfigError: the key file or the address for traces is unusable, or two settings contradict each other.
    """
    keys = ApiKeys(settings.api_key, settings.api_key_file)
    if settings.max_requests_per_key is not None and not keys:
        raise ConfigError("--max-requests-per-key needs API keys to tell clients apart: add --api-key-file")
    if settings.allow_runtime_lora and not keys:
        log.warning(
            "--allow-runtime-lora is on and no API key is set: any client may load adapters, and learn which folders"
            " this machine has; add --api-key-file"
        )
    tracing = start_tracing(settings)
    app = FastAPI(
        title="Tokenplane",
        version=__version__,
        lifespan=_lifespan,
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
    )
    app.state.service = service = Service(engine, tokenizer, chat_template, settings)
    app.state.keys, app.state.tracing = keys, tracing
    routers = all_routers(settings)
    for router in routers:
        app.include_router(router)

    def asks_key(method: str, path: str) -> bool:
        return bool(keys) and not is_open(method, path, settings.vertex_health_route)

    document = openapi.openapi(routers, asks_key)
    app.state.openapi, app.state.docs_page = msgspec.json.encode(document), render(document).encode()
    for kind in (ApiError, RequestError, HTTPException, ClientGone):
        app.add_exception_handler(kind, _on_error)
    # The last one added is the outermost.
    if keys:
        app.add_middleware(RequireKey, keys=keys, health_route=settings.vertex_health_route)
    app.add_middleware(
        CORSMiddleware,
        allow_origins=settings.cors_allow_origins,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],  # browser clients of OpenAI's send a dozen of their own
        expose_headers=["x-request-id", "retry-after"],
    )
    app.add_middleware(RequestScope, metrics=service.metrics, settings=settings, tracing=tracing)
    return app


def all_routers(settings: Settings) -> list[APIRouter]:
    """In the order in which they are asked."""
    return [
        both_dialects.vertex_router(settings),  # first: what the operator names wins
        openai_routes.router,
        adapter_routes.router,
        tgi_routes.router,
        both_dialects.router,
        kserve.router,
        health.router,
        openapi.router,
    ]


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    service: Service = app.state.service
    keys: ApiKeys = app.state.keys
    tracing: Tracing | None = app.state.tracing
    if service.settings.api_key_file is not None:
        with contextlib.suppress(RuntimeError, ValueError):  # only the main thread gets signals
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, keys.reload)
    service.starting()
    try:
        yield
    finally:
        await service.close()
        if tracing is not None:
            await asyncio.to_thread(tracing.close)


async def _on_error(request: Request, error: Exception) -> Response:
    record = record_of(request)
    record.cancel()
    if isinstance(error, ClientGone):
        record.client_left = True
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    record.error = describe_http_error(request, error) if isinstance(error, HTTPException) else as_api_error(error)
    return error_response(request.url.path, record.error)
