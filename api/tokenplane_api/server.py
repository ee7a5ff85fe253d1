"""From options to a running server: model folder, backend, engine, port; then serve until a signal.

The port opens before the model is loaded, so that /live answers and /health says 503 meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import uvicorn
from fastapi import FastAPI

from tokenplane_core.backend.choice import choose, choose_device
from tokenplane_core.backend.errors import ConfigError, TokenplaneError
from tokenplane_core.client import EngineClient
from tokenplane_core.config import EngineConfig
from tokenplane_core.memory import format_table
from tokenplane_core.messages import EngineInfo
from tokenplane_core.model import describe_model

from .app import create_app
from .devices import SIMULATED
from .hub import model_sha, resolve_model
from .service import Service
from .settings import Settings
from .text.chat_template import ChatTemplate
from .text.tokenizer import TextTokenizer

log = logging.getLogger("tokenplane.server")

KEEP_ALIVE_CONNECTION_S = 75
"""Longer than the usual idle limit of load balancers, so that they and not we close idle connections."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """What `tokenplane serve` was told about model, engine and port; the API's part is Settings."""

    model_id: str
    revision: str | None = None
    backend: str | None = None
    device_index: int | None = None  # None: the best that is ok
    dtype: str | None = None
    trust_remote_code: bool = False
    tokenizer_config_path: Path | None = None
    hub_cache: Path | None = None
    num_threads: int | None = None
    max_step_tokens: int | None = None
    max_sequences: int | None = None
    kv_cache_tokens: int | None = None
    prefix_cache: bool = True
    ready_timeout_s: int = 600
    hostname: str = "0.0.0.0"
    port: int = 3000
    grace_s: int = 90


def serve(options: ServeOptions, make_settings: Callable[[str | None], Settings]) -> None:
    """Serve until SIGTERM or SIGINT.

    make_settings: given the commit of the model (None for a folder), the API's settings.

    Raises:
        TokenplaneError: the server cannot start; the message is for the user.
    """
    with bind(options.hostname, options.port) as listener:
        answer = choose(options.backend)
        device, why = choose_device(answer, options.device_index)
        log.info("Backend %s %s, device %d (%s): %s", answer.name, answer.version, device.index, why, device.name)
        folder = resolve_model(
            options.model_id,
            options.revision,
            cache_dir=options.hub_cache,
            needs_weights=device.kind != SIMULATED,
            trust_remote_code=options.trust_remote_code,
            progress=log.info,
        )
        settings = make_settings(model_sha(folder))
        spec = describe_model(
            folder,
            options.model_id,
            options.revision,
            options.dtype,
            settings.max_total_tokens,
            options.trust_remote_code,
        )
        tokenizer = TextTokenizer.load(folder, options.tokenizer_config_path)
        template = ChatTemplate.load(folder, options.tokenizer_config_path)
        log.info(
            "Model %s: %s, %s, from %s",
            options.model_id,
            spec.architecture or "architecture unknown",
            spec.dtype,
            folder,
        )
        if template is None:
            log.warning("The model has no chat template: /v1/chat/completions will refuse requests")
        config = EngineConfig(
            model=spec,
            backend=answer.name,
            device_index=device.index,
            device=device,
            num_threads=options.num_threads,
            max_step_tokens=options.max_step_tokens,
            max_sequences=options.max_sequences,
            kv_cache_tokens=options.kv_cache_tokens,
            required_tokens=settings.max_total_tokens,
            prefix_cache=options.prefix_cache,
            ready_timeout_s=options.ready_timeout_s,
        )
        app = create_app(EngineClient(config, settings.max_concurrent_requests), tokenizer, template, settings)
        _run(app, listener, options.grace_s)


def bind(hostname: str, port: int) -> socket.socket:
    """Take the port without opening it: a busy one should not be noticed after a long download.

    Raises:
        ConfigError: the address is not ours, or the port is busy or not allowed.
    """
    try:
        found = socket.getaddrinfo(hostname, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
        family, _, _, _, address = found[0]
        # asyncio turns Nagle's algorithm off only where the protocol is named; with it, every answer is 40 ms late.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    except OSError as error:
        raise ConfigError(
            f"--hostname is {hostname!r}, which is no address of this machine: {error.strerror}"
        ) from error
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise _busy(address, error) from error
    return listener


def _busy(address: tuple[Any, ...], error: OSError) -> ConfigError:
    return ConfigError(f"cannot listen on {address[0]} port {address[1]}: {error.strerror}; choose another with --port")


def is_ip_address(hostname: str) -> bool:
    try:
        ipaddress.ip_address(hostname)
    except ValueError:
        return False
    return True


def _run(app: FastAPI, listener: socket.socket, grace_s: int) -> None:
    try:
        listener.listen()
    except OSError as error:
        raise _busy(listener.getsockname(), error) from error
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="on",
        timeout_keep_alive=KEEP_ALIVE_CONNECTION_S,
        timeout_graceful_shutdown=grace_s,
    )
    make_loop: Any = config.get_loop_factory()
    with _surviving_signals(), asyncio.Runner(loop_factory=make_loop) as runner:
        runner.run(_serve_until_stopped(app, uvicorn.Server(config), listener))


@contextlib.contextmanager
def _surviving_signals() -> Iterator[None]:
    """When it is done, uvicorn raises the signal that stopped it again; a server that stopped as asked exits with 0."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *_: None) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


async def _serve_until_stopped(app: FastAPI, server: uvicorn.Server, listener: socket.socket) -> None:
    service: Service = app.state.service
    started_s = perf_counter()
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    starting = service.starting()
    await asyncio.wait((serving, starting), return_when=asyncio.FIRST_COMPLETED)
    failure = starting.exception() if starting.done() and not starting.cancelled() else None
    if failure is not None:
        server.should_exit = True
    elif service.is_ready and not server.should_exit:  # a signal may come first, and takes the port away
        _log_banner(service, listener, perf_counter() - started_s)
    await serving
    if isinstance(failure, TokenplaneError):
        raise failure
    if failure is not None:
        raise RuntimeError("the engine could not be started") from failure
    log.info("Stopped")


def _log_banner(service: Service, listener: socket.socket, elapsed_s: float) -> None:
    info, settings = service.engine.info, service.settings
    limits = service.require_ready()
    for line in banner(info, settings, limits.max_input_tokens, limits.max_total_tokens):
        log.info("%s", line)
    log.info("Ready after %.1f s: %s", elapsed_s, url_of(listener))


def banner(info: EngineInfo, settings: Settings, max_input_tokens: int, max_total_tokens: int) -> list[str]:
    """What the server turned out to be, and which limits it chose itself."""

    def by(given: int | None) -> str:
        return "computed" if given is None else "as given"

    cache_tokens = info.num_blocks * info.block_tokens
    cache_mib = info.num_blocks * info.block_bytes / 2**20
    kernels = ", ".join(f"{piece}: {choice}" for piece, choice in info.kernels.items())
    return [
        f"Device: {info.device} ({info.backend}), {info.dtype}"
        + (f"; {info.device_notes}" if info.device_notes else ""),
        f"Kernels: {kernels or 'the backend names none'}",
        f"Weights: {info.weights_bytes / 2**20:.1f} MiB, loaded in {info.load_s:.1f} s",
        f"KV cache: {cache_tokens} tokens, {cache_mib:.1f} MiB, {info.num_blocks} blocks of {info.block_tokens},"
        f" prefix cache {'on' if info.prefix_cache else 'off'}",
        f"Limits: prompt {max_input_tokens} tokens ({by(settings.max_input_tokens)}), with answer {max_total_tokens}"
        f" ({by(settings.max_total_tokens)}), {settings.max_concurrent_requests} requests at once",
        f"Batches: {info.max_step_tokens} tokens a step, {info.max_sequences} sequences",
        *format_table(info.memory),
    ]


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
