"""From options to a running server: model folder, backend, engine, port; then serve until a signal.

The port opens before the model is loaded, so that /live answers and /health says 503 meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import uvicorn
from fastapi import FastAPI

from tokenplane_core.backend.choice import choose, choose_device
from tokenplane_core.backend.errors import ConfigError, TokenplaneError
from tokenplane_core.backend.records import Device, ModelSpec
from tokenplane_core.client import EngineClient
from tokenplane_core.config import EngineConfig
from tokenplane_core.garbage import settle
from tokenplane_core.memory import SIMULATED
from tokenplane_core.model import describe_model

from .adapters import AdapterPlan, plan_adapters
from .app import create_app
from .banner import banner
from .http_guard import guarded_protocol
from .hub import model_sha, resolve_model
from .quantization import kv_dtype_of, quantize_at_load
from .service import Service
from .settings import ServeOptions, Settings
from .text.chat_template import ChatTemplate
from .text.tokenizer import TextTokenizer

log = logging.getLogger("tokenplane.server")

KEEP_ALIVE_CONNECTION_S = 75
"""Longer than the usual idle limit of load balancers, so that they and not we close idle connections."""


def serve(options: ServeOptions, settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        TokenplaneError: the server cannot start; the message is for the user.
    """
    with bind(options.hostname, options.port) as listener:
        answer = choose(options.backend)
        device, why = choose_device(answer, options.device_index)
        log.info("Backend %s %s, device %d (%s): %s", answer.name, answer.version, device.index, why, device.name)
        folder = _fetch_model(options, needs_weights=device.kind != SIMULATED)
        settings = replace(settings, model_sha=model_sha(folder))
        model = describe_model(
            folder,
            options.model_id,
            options.revision,
            options.dtype,
            settings.max_total_tokens,
            options.trust_remote_code,
        )
        quantize = quantize_at_load(options.quantize, model.config, answer.name, device.offer.quantizes)
        kv_dtype = kv_dtype_of(options.kv_cache_dtype, answer.name, device.offer.kv_dtypes)
        model = replace(model, quantize=quantize, kv_dtype=kv_dtype)
        log.info("Model %s: %s, %s, from %s", options.model_id, model.architecture or "?", model.dtype, folder)
        tokenizer = TextTokenizer.load(folder, options.tokenizer_config_path)
        template = ChatTemplate.load(folder, options.tokenizer_config_path)
        if template is None:
            log.warning("The model has no chat template: /v1/chat/completions will refuse requests")
        adapters = plan_adapters(
            options.lora_adapters,
            settings.accepted_names,
            max_adapters=options.max_loras,
            max_rank=options.max_lora_rank,
            may_load_later=settings.allow_runtime_lora,
            hub_cache=options.hub_cache,
            progress=log.info,
        )
        config = _engine_config(options, settings, model, answer.name, device, adapters)
        engine = EngineClient(config, settings.max_concurrent_requests, settings.queue_timeout_s)
        _run(create_app(engine, tokenizer, template, settings), listener, options)


def _fetch_model(options: ServeOptions, needs_weights: bool) -> Path:
    return resolve_model(
        options.model_id,
        options.revision,
        cache_dir=options.hub_cache,
        needs_weights=needs_weights,
        trust_remote_code=options.trust_remote_code,
        progress=log.info,
    )


def _engine_config(
    options: ServeOptions,
    settings: Settings,
    model: ModelSpec,
    backend: str,
    device: Device,
    adapters: AdapterPlan,
) -> EngineConfig:
    return EngineConfig(
        model=model,
        backend=backend,
        device_index=device.index,
        device=device,
        memory_fraction=options.memory_fraction,
        graph_rows=options.graph_rows,
        num_threads=options.num_threads,
        max_step_tokens=options.max_step_tokens,
        max_sequences=options.max_sequences,
        kv_cache_tokens=options.kv_cache_tokens,
        required_tokens=settings.max_total_tokens,
        prefix_cache=options.prefix_cache,
        max_drafts=options.max_drafts,
        adapters=adapters.folders,
        max_adapters=adapters.max_adapters,
        max_adapter_rank=adapters.max_rank,
        ready_timeout_s=options.ready_timeout_s,
        json_log=options.json_output,
    )


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


def _run(app: FastAPI, listener: socket.socket, options: ServeOptions) -> None:
    try:
        listener.listen()
    except OSError as error:
        raise _busy(listener.getsockname(), error) from error
    config = uvicorn.Config(
        app,
        http=guarded_protocol(app.state.service.settings),
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="on",
        timeout_keep_alive=KEEP_ALIVE_CONNECTION_S,
        timeout_graceful_shutdown=options.grace_s,
    )
    make_loop: Any = config.get_loop_factory()
    with _surviving_signals(), asyncio.Runner(loop_factory=make_loop) as runner:
        runner.run(_serve_until_stopped(app, uvicorn.Server(config), listener, options))


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


async def _serve_until_stopped(
    app: FastAPI, server: uvicorn.Server, listener: socket.socket, options: ServeOptions
) -> None:
    service: Service = app.state.service
    started_s = perf_counter()
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    starting = service.starting()
    await asyncio.wait((serving, starting), return_when=asyncio.FIRST_COMPLETED)
    failure = starting.exception() if starting.done() and not starting.cancelled() else None
    if failure is not None:
        server.should_exit = True
    elif service.is_ready and not server.should_exit:  # a signal may come first, and takes the port away
        for line in banner(service.engine.info, options, service.settings, service.require_ready()):
            log.info("%s", line)
        settle()
        log.info("Ready after %.1f s: %s", perf_counter() - started_s, url_of(listener))
    await serving
    if isinstance(failure, TokenplaneError):
        raise failure
    if failure is not None:
        raise RuntimeError("the engine could not be started") from failure
    log.info("Stopped")


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
