"""Thousands of requests that are made from the OpenAPI document, right and wrong ones, against a real server process.

Every answer must be declared in the document and look as it says there; none may be a server error. The device is
simulated, so that a request costs as little as it can.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import booleans
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from helpers.live_server import wait_until
from helpers.server_process import ServerProcess, server_process
from tokenplane_api.app import all_routers
from tokenplane_api.openapi import openapi
from tokenplane_api.settings import Settings

DOCUMENT = openapi(all_routers(Settings(model_id="m")), lambda method, path: False)
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]

TOLERANT = {"generate_stream", "tokenize", "get_chat_tokenize"}
"""Say what is wrong with parameters in their stream, or do not read them."""

schema = schemathesis.openapi.from_dict(DOCUMENT)

SETTINGS = settings(
    max_examples=40, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
"""Beside these random requests each operation gets those that schemathesis derives from every keyword of its schema,
about twice as many, and cheaper to make."""


@pytest.fixture(scope="module")
def server(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Short answers; and everything given back in the end."""
    limits = ("--max-input-tokens", "200", "--max-total-tokens", "208")
    folder = tmp_path_factory.mktemp("fuzz")
    with server_process(model_folder, folder, "--backend", "simulated-cuda", *limits) as running:
        yield running
        assert running.is_ready()
        assert "internal error" not in running.log
        wait_until(lambda: holds_nothing(running), 10, "the engine to hold nothing")


def holds_nothing(server: ServerProcess) -> bool:
    """And has never been replaced."""
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    values = dict(line.split() for line in lines if line.startswith("tokenplane_") and "{" not in line)
    names = ("requests_live", "requests_running", "requests_waiting", "kv_blocks_used", "engine_restarts_total")
    return not any(float(values[f"tokenplane_{name}"]) for name in names)


@schema.parametrize()
@SETTINGS
def test_every_answer_is_as_the_document_says(case: schemathesis.Case, server: ServerProcess) -> None:
    if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
        case.body["model"] = "tgi"  # any other name is a 404, whatever else is wrong
    refuses = case.operation.definition.raw["operationId"] not in TOLERANT
    case.call_and_validate(base_url=server.url, checks=[*CHECKS, negative_data_rejection] if refuses else CHECKS)


USER = [{"role": "user", "content": "Hi"}]
SOUND: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": USER, "max_tokens": 4},
    "/v1/completions": {"prompt": "Hi", "max_tokens": 4},
    "/v1/responses": {"input": "Hi", "max_output_tokens": 4},
}
HARMLESS = {"temperature", "top_p", "top_k", "min_p", "seed", "frequency_penalty", "logprobs", "user", "n"}


@pytest.mark.parametrize("path", SOUND)
def test_answers_with_text_are_so_too(path: str, server: ServerProcess) -> None:
    """Few random bodies make sense as a whole; these are sound ones with little of a random one."""
    kinds: Counter[tuple[int, str]] = Counter()

    @settings(SETTINGS, max_examples=80)
    @given(schema[path]["POST"].as_strategy(generation_mode=schemathesis.GenerationMode.POSITIVE), booleans())
    def ask(case: schemathesis.Case, stream: bool) -> None:
        names = sorted(name for name in case.body if name not in SOUND[path])
        kept = HARMLESS | set(names[len(str(case.body)) % (len(names) or 1) :][:1])
        case.body = SOUND[path] | {"stream": stream} | {name: case.body[name] for name in names if name in kept}
        answer = case.call_and_validate(base_url=server.url, checks=CHECKS)
        kinds[answer.status_code, answer.headers["content-type"][0]] += 1

    ask()
    assert kinds[200, "application/json"] >= 10 and kinds[200, "text/event-stream"] >= 10, kinds
