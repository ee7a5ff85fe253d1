"""The OpenAPI document says what the server does, and the page shows what the document says."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute
from jsonschema import Draft202012Validator

from helpers.document import STREAM, Document, references
from helpers.live_server import LiveServer, live_server
from tokenplane_api.app import all_routers
from tokenplane_api.settings import Settings

DOCUMENT_ROUTES = {"/openapi.json", "/api-doc/openapi.json", "/docs", "/docs/"}

OF_TGI = {
    "compat_generate", "generate", "generate_stream", "chat_completions", "completions", "tokenize",
    "get_chat_tokenize", "health", "get_model_info", "openai_get_model_info", "metrics", "sagemaker_compatibility",
}  # fmt: skip
"""Client generators name functions after these."""


@pytest.fixture(scope="session")
def document(server: LiveServer) -> Document:
    return server.document


def test_it_is_served_where_tgi_serves_it_and_where_others_look(client: httpx.Client, document: Document) -> None:
    answers = [client.get(path) for path in ("/openapi.json", "/api-doc/openapi.json")]
    assert all(answer.headers["content-type"] == "application/json" for answer in answers)
    assert [answer.json() for answer in answers] == [document.raw, document.raw]
    assert document.raw["openapi"] == "3.1.0"


def test_every_schema_is_one_and_every_reference_leads_somewhere(document: Document) -> None:
    for schema in document.schemas.values():
        Draft202012Validator.check_schema(schema)
    named = set(references(document.raw))
    assert named == set(document.schemas)


def test_every_route_is_in_the_document_and_the_reverse(client: httpx.Client, document: Document) -> None:
    routes = [route for router in all_routers(Settings(model_id="m")) for route in router.routes]
    described, others = set(), set()
    for route in routes:
        assert isinstance(route, APIRoute)
        path = re.sub(r":\w+}", "}", route.path)
        (described if route.include_in_schema else others).update((path, m) for m in route.methods or ())
    in_document = {(path, m.upper()) for path, methods in document.raw["paths"].items() for m in methods}
    assert described == in_document
    for path, method in others - {(path, "GET") for path in DOCUMENT_ROUTES}:
        answer = client.request(method, path.replace("{rest}", "x"))
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unsupported_endpoint"), path


def test_operations_have_names_of_their_own_and_those_of_tgi(document: Document) -> None:
    ids = [operation["operationId"] for operation in operations(document)]
    assert len(set(ids)) == len(ids)
    assert set(ids) >= OF_TGI


def test_every_operation_and_every_field_of_a_request_is_explained(document: Document) -> None:
    assert all(operation["summary"] for operation in operations(document))
    fields = document.request_fields(document.raw["paths"])
    assert len(fields) > 150
    for name in fields:
        schema, field = name.split(".")
        described = document.schemas[schema]["properties"][field]
        assert "description" in described or list(references(described)), f"{name} has no words"


def test_values_that_ask_for_nothing_are_listed(document: Document) -> None:
    fields = document.schemas["ChatRequest"]["properties"]
    assert fields["store"]["enum"] == [None, False]
    assert fields["modalities"]["enum"] == [None, ["text"]]


USER = [{"role": "user", "content": "Hi"}]
TOOLS = [{"type": "function", "function": {"name": "f"}}]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate_stream", {"inputs": "Hi", "parameters": {"max_new_tokens": 4, "details": True, "top_n_tokens": 2}}),
        ("/", {"inputs": "Hi", "parameters": {"max_new_tokens": 4}, "stream": True}),
        ("/v1/chat/completions", {"messages": USER, "logprobs": True, "top_logprobs": 2}),
        ("/v1/chat/completions", {"messages": USER, "tools": TOOLS, "tool_choice": "required"}),
        ("/v1/completions", {"prompt": ["Hi", "Ho"], "logprobs": 0, "echo": True}),
        ("/v1/responses", {"input": "Hi"}),
        ("/invocations", {"inputs": "Hi", "parameters": {"max_new_tokens": 4}, "stream": True}),
        ("/invocations", {"prompt": "Hi"}),
    ],
)  # fmt: skip
def test_every_event_of_a_stream_is_as_declared(
    client: httpx.Client, document: Document, path: str, body: dict[str, Any]
) -> None:
    if "inputs" not in body:
        options = {"max_output_tokens": 4} if path == "/v1/responses" else {"max_tokens": 60, "temperature": 0}
        body = {**body, "stream": True, **options}
        if path != "/v1/responses":
            body["stream_options"] = {"include_usage": True}
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == STREAM
    assert document.check_events(answer) >= 3


# --- Keys ---------------------------------------------------------------------------------------------------


def test_what_asks_for_a_key_says_so_and_nothing_else_does(model_folder: Path) -> None:
    with live_server(model_folder, api_key="secret", vertex_health_route="/well") as server, server.client() as client:
        for path, methods in server.document.raw["paths"].items():
            for method, operation in methods.items():
                answer = client.request(method, re.sub(r"{\w+}", "x", path))
                assert (answer.status_code == 401) == bool(operation["security"]), (method, path)
                assert ("401" in operation["responses"]) == bool(operation["security"])
        assert not server.document.raw["paths"]["/well"]["get"]["security"]
        assert all(client.get(path).status_code == 200 for path in ("/docs", "/openapi.json", "/api-doc/openapi.json"))
        assert client.post("/docs").status_code == 401


def test_routes_that_an_operator_names_are_in_the_document(model_folder: Path) -> None:
    with live_server(model_folder, vertex_predict_route="/predict", wait_ready=False) as server:
        operation = server.document.operation("POST", "/predict")
        assert operation is not None and "requestBody" in operation
        ids = [operation["operationId"] for operation in operations(server.document)]
        assert len(set(ids)) == len(ids)


# --- The page -----------------------------------------------------------------------------------------------


def test_the_page_shows_every_operation_schema_and_field(client: httpx.Client, document: Document) -> None:
    answer = client.get("/docs")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    text = unescape(re.sub(r"<[^>]+>", "", answer.text))
    for path, methods in document.raw["paths"].items():
        assert path in text
        assert all(operation["summary"].replace("`", "") in text for operation in methods.values())
    for name, schema in document.schemas.items():
        assert name in text
        assert all(field in text for field in schema["properties"])


def test_the_page_asks_nobody_for_anything(client: httpx.Client) -> None:
    html = client.get("/docs/", follow_redirects=True).text
    assert "<script" not in html and "@import" not in html and "url(" not in html
    links = re.findall(r"""(?:src|href|action)=["']([^"']*)""", html)
    assert links
    ids = set(re.findall(r'id="([^"]*)"', html))
    assert all(link == "openapi.json" or link.removeprefix("#") in ids for link in links)


def operations(document: Document) -> list[dict[str, Any]]:
    return [operation for methods in document.raw["paths"].values() for operation in methods.values()]
