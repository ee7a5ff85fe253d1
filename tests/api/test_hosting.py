"""What hosting platforms call: SageMaker, Vertex AI and KServe."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from helpers.live_server import LiveServer, live_server
from tokenplane_api.both_dialects import vertex_router
from tokenplane_api.settings import Settings
from tokenplane_core.backend.errors import ConfigError

USER = [{"role": "user", "content": "Hi"}]
GENERATE: dict[str, Any] = {"inputs": "Hi", "parameters": {"max_new_tokens": 5}}
CHAT: dict[str, Any] = {"messages": USER, "max_tokens": 5, "temperature": 0}
COMPLETION: dict[str, Any] = {"prompt": "Hi", "max_tokens": 5, "temperature": 0}


# --- SageMaker ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "path"), [(GENERATE, "/"), (CHAT, "/v1/chat/completions"), (COMPLETION, "/v1/completions")]
)
def test_invocations_are_the_route_that_the_body_is_for(client: httpx.Client, body: Any, path: str) -> None:
    direct, invoked = (client.post(p, json=body) for p in (path, "/invocations"))
    assert invoked.status_code == 200
    assert answer_of(invoked.json()) == answer_of(direct.json())
    assert invoked.headers["x-generated-tokens"] == direct.headers["x-generated-tokens"]


@pytest.mark.parametrize("body", [GENERATE, CHAT, COMPLETION])
def test_invocations_stream(client: httpx.Client, body: Any) -> None:
    answer = client.post("/invocations", json={**body, "stream": True})
    assert answer.headers["content-type"] == "text/event-stream"
    fewest = 1 if body is COMPLETION else 2  # tokens that come late come in one event
    assert answer.text.count("data: {") >= fewest
    assert ("[DONE]" in answer.text) == ("inputs" not in body)


def test_the_first_field_of_tgis_order_decides(client: httpx.Client) -> None:
    assert "generated_text" in client.post("/invocations", json={**COMPLETION, **GENERATE}).json()[0]


def test_invocations_name_what_they_could_be(client: httpx.Client) -> None:
    answer = client.post("/invocations", json={"text": "Hi"})
    assert (answer.status_code, answer.json()["error_type"]) == (422, "validation")
    assert all(name in answer.json()["error"] for name in ("`inputs`", "`messages`", "`prompt`"))


@pytest.mark.parametrize("raw", [b"", b"[]", b"5", b'{"inputs": }', b'{"inputs": "\\ud800"}', b'{"inputs": 1}'])
def test_malformed_invocations_are_the_clients_fault(client: httpx.Client, raw: bytes) -> None:
    answer = client.post("/invocations", content=raw, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 422) and answer.json()["error"]


def answer_of(body: Any) -> Any:
    return (body["object"], body["choices"]) if isinstance(body, dict) else body


# --- Vertex AI ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vertex_server(model_folder: Path) -> Iterator[LiveServer]:
    with live_server(
        model_folder,
        api_key="key",
        vertex_predict_route="/v1/endpoints/7:predict",
        vertex_health_route="/v1/endpoints/7",
    ) as live:
        yield live


def test_vertex_answers_instances_of_both_kinds_in_order(client: httpx.Client) -> None:
    answer = client.post("/vertex", json={"instances": [CHAT, GENERATE, CHAT]})
    assert answer.status_code == 200
    generated = client.post("/generate", json=GENERATE).json()["generated_text"]
    chat = client.post("/v1/chat/completions", json=CHAT).json()["choices"][0]["message"]["content"]
    assert answer.json() == {"predictions": [chat, generated, chat]}


def test_all_parameters_of_an_instance_count(client: httpx.Client) -> None:
    long = {"inputs": "Hi", "parameters": {"max_new_tokens": 30, "return_full_text": True, "best_of": 2, "top_k": 1}}
    first, second = client.post("/vertex", json={"instances": [long, GENERATE]}).json()["predictions"]
    assert first.startswith("Hi") and len(first) > len(second)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"instances": []}, ["instances"]),
        ({}, ["instances"]),
        ({"instances": [GENERATE, {"inputs": "Hi", "parameters": {"top_p": 2}}]}, ["instances[1]", "top_p"]),
        ({"instances": [{"prompt": "Hi"}]}, ["instances[0]", "inputs"]),
        ({"instances": [{"messages": []}]}, ["instances[0]", "messages"]),
        ({"instances": [5]}, ["instances[0]", "an object"]),
        ({"instances": [GENERATE] * 200}, ["instances", "128"]),
    ],
    ids=lambda value: str(value)[:50],
)
def test_a_bad_instance_is_named(client: httpx.Client, body: Any, words: list[str]) -> None:
    answer = client.post("/vertex", json=body)
    assert (answer.status_code, answer.json()["error_type"]) == (422, "validation")
    assert all(word in answer.json()["error"] for word in words), answer.text


def test_vertex_has_its_own_paths_too(vertex_server: LiveServer) -> None:
    with vertex_server.client(headers={"authorization": "Bearer key"}) as client:
        answer = client.post("/v1/endpoints/7:predict", json={"instances": [GENERATE]})
        assert answer.json() == client.post("/vertex", json={"instances": [GENERATE]}).json()
    with vertex_server.client() as stranger:
        assert stranger.get("/v1/endpoints/7").status_code == 200
        assert stranger.post("/v1/endpoints/7:predict", json={"instances": [GENERATE]}).status_code == 401
        assert stranger.post("/vertex", json={"instances": [GENERATE]}).status_code == 401
        assert [stranger.get(path).status_code for path in ("/v2/health/live", "/v2/health/ready", "/v2")] == [
            200,
            200,
            401,
        ]
        for path in ("/invocations", "/chat_tokenize", "/v2/models/m/versions/1/infer"):
            assert stranger.post(path, json={}).status_code == 401


@pytest.mark.parametrize("field", ["vertex_predict_route", "vertex_health_route"])
def test_a_path_begins_with_a_slash(field: str) -> None:
    with pytest.raises(ConfigError, match=r"AIP_.*_ROUTE is 'predict'"):
        vertex_router(Settings(model_id="m", **{field: "predict"}))


# --- KServe -------------------------------------------------------------------------------------------------


def test_kserve_describes_itself(client: httpx.Client) -> None:
    assert client.get("/v2").json()["name"] == "text-generation-inference"
    for path in ("/v2/health/live", "/v2/health/ready", "/v2/models/m/versions/3/ready"):
        assert client.get(path).json() == {"live": True}
    assert client.get("/v2/models/m/versions/3").json() == {
        "name": "m",
        "version": "3",
        "extensions": ["infer", "ready"],
    }


def test_kserve_answers_each_input(client: httpx.Client) -> None:
    texts = ["Hi", "Zwölf 👍"]
    tensors = [{"name": t, "shape": [1, 1], "datatype": "BYTES", "data": list(t.encode())} for t in texts]
    body = {
        "id": "x",
        "inputs": tensors,
        "outputs": [{"name": "a"}, {"name": "b"}],
        "parameters": {"max_new_tokens": 6, "best_of": 2, "top_k": 1},
    }
    outputs = client.post("/v2/models/m/versions/3/infer", json=body).json()["outputs"]
    assert [output["name"] for output in outputs] == ["a", "b"]
    for text, output in zip(texts, outputs, strict=True):
        alone = client.post("/generate", json={"inputs": text, "parameters": {"max_new_tokens": 6}}).json()
        assert bytes(output["data"]).decode() == alone["generated_text"]


@pytest.mark.parametrize(
    ("data", "outputs", "words"),
    [
        ([255], [{"name": "a"}], ["inputs[0].data", "UTF-8"]),
        ([256], [{"name": "a"}], ["inputs[0].data"]),
        ([], [{"name": "a"}], ["inputs[0]", "empty"]),
        ([72], [], ["inputs", "outputs"]),
    ],
)
def test_bad_tensors_are_named(client: httpx.Client, data: list[int], outputs: Any, words: list[str]) -> None:
    tensor = {"name": "a", "shape": [1, 1], "datatype": "BYTES", "data": data}
    answer = client.post("/v2/models/m/versions/3/infer", json={"id": "", "inputs": [tensor], "outputs": outputs})
    assert (answer.status_code, answer.json()["error_type"]) == (422, "validation")
    assert all(word in answer.json()["error"] for word in words), answer.text


# --- /chat_tokenize -----------------------------------------------------------------------------------------


def test_chat_tokenize_shows_what_the_template_makes(client: httpx.Client) -> None:
    answer = client.post("/chat_tokenize", json={"messages": USER}).json()
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert answer["templated_text"] == text
    tokens = answer["tokenize_response"]
    assert [token["id"] for token in tokens][:1] == [1]
    assert "".join(token["text"] for token in tokens) == text
    assert tokens[-1]["stop"] == len(text)
    used = client.post("/v1/chat/completions", json=CHAT).json()["usage"]["prompt_tokens"]
    assert used == len(tokens)


def test_chat_tokenize_says_what_is_wrong_with_a_conversation(client: httpx.Client) -> None:
    for body in ({"messages": []}, {"messages": [{"role": "user"}]}, {}):
        answer = client.post("/chat_tokenize", json=body)
        assert answer.status_code == 422 and "messages" in answer.json()["error"], answer.text
