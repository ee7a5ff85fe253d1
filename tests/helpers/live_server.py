"""The real HTTP server in a thread of the test process, over a real engine process with a simulated device."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI

from helpers.document import Document
from tokenplane_api.app import create_app
from tokenplane_api.http_guard import guarded_protocol
from tokenplane_api.server import bind, url_of
from tokenplane_api.service import Service
from tokenplane_api.settings import Settings
from tokenplane_api.text.chat_template import ChatTemplate
from tokenplane_api.text.tokenizer import TextTokenizer
from tokenplane_core.client import EngineClient
from tokenplane_core.config import EngineConfig
from tokenplane_core.model import describe_model

MODEL_ID = "acme/tiny-chat"


@dataclass
class LiveServer:
    """`service` lives in the server's thread: read its numbers, do not call it."""

    url: str
    app: FastAPI

    @property
    def service(self) -> Service:
        service: Service = self.app.state.service
        return service

    @cached_property
    def document(self) -> Document:
        return Document(json.loads(self.app.state.openapi))

    def client(self, **options: Any) -> httpx.Client:
        """Holds every answer against the OpenAPI document."""
        hooks = {"response": [self.document.check]}
        return httpx.Client(base_url=self.url, timeout=30, event_hooks=hooks, **options)

    def wait_ready(self, timeout_s: float = 30) -> None:
        wait_until(lambda: self.service.is_ready, timeout_s, "the server to be ready")

    def wait_idle(self, timeout_s: float = 10) -> None:
        """Until the engine holds no request and no block; its stats are a second old at most."""

        def idle() -> bool:
            engine = self.service.engine
            return not (
                engine.num_live or engine.stats.num_running or engine.stats.num_waiting or engine.stats.blocks_used
            )

        wait_until(idle, timeout_s, "the engine to be idle")


def wait_until(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"waited {timeout_s} s for {what}"
        time.sleep(0.02)


@contextlib.contextmanager
def live_server(
    folder: Path,
    *,
    backend: str = "simulated-cuda",
    step_ms: float = 0,
    wait_ready: bool = True,
    engine: dict[str, Any] | None = None,
    client_type: type[EngineClient] = EngineClient,
    **settings: Any,
) -> Iterator[LiveServer]:
    """Serve the model folder on a free loopback port. step_ms: how long the device takes for a step."""
    config = EngineConfig(model=describe_model(folder, MODEL_ID), backend=backend, **(engine or {}))
    chosen = Settings(model_id=MODEL_ID, **settings)
    client = client_type(config, chosen.max_concurrent_requests, chosen.queue_timeout_s)
    app = create_app(client, TextTokenizer.load(folder), ChatTemplate.load(folder), chosen)
    listener = bind("127.0.0.1", 0)
    server = uvicorn.Server(
        uvicorn.Config(app, http=guarded_protocol(chosen), ws="none", log_config=None, access_log=False, lifespan="on")
    )
    os.environ["TOKENPLANE_SIMULATED_STEP_MS"] = str(step_ms)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])), name="live-server")
    url = url_of(listener)
    thread.start()
    live = LiveServer(url, app)
    try:
        wait_until(lambda: server.started, 30, "the port to open")
        if wait_ready:
            live.wait_ready()
        yield live
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        os.environ.pop("TOKENPLANE_SIMULATED_STEP_MS", None)
        assert not thread.is_alive(), "the server does not stop"
