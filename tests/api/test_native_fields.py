"""Every field of the native requests has an effect, or is refused: one check for each, and none may be missing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from helpers.live_server import LiveServer
from tokenplane_api.errors import is_openai_path
from tokenplane_api.tgi import schemas

INPUTS = "What is the capital of France?"
Check = Callable[[httpx.Client], None]
CHECKS: dict[str, Check] = {}


def shows(*names: str) -> Callable[[Check], Check]:
    def note(check: Check) -> Check:
        for name in names:
            assert name not in CHECKS, f"{name} has two checks"
            CHECKS[name] = check
        return check

    return note


def test_every_field_of_the_document_has_a_check(server: LiveServer) -> None:
    """Of the requests that test_openai_fields.py does not look at."""
    document = server.document
    openai = {path for path in document.raw["paths"] if is_openai_path(path)}
    native = set(document.raw["paths"]) - openai
    assert document.request_fields(native) - document.request_fields(openai) == set(CHECKS)


VALUES: list[Any] = [None, True, -1, 0, 10**25, 1e300, "", "x", [], [[]], [None], {}, {"a": {}}, {"type": "regex"}]


@pytest.mark.parametrize("path", ["/generate", "/", "/vertex", "/invocations", "/v2/models/m/versions/1/infer"])
def test_every_field_survives_every_type(path: str, client: httpx.Client) -> None:
    """No combination of field and JSON type may cost a 5xx."""
    for body in (body for value in VALUES for body in bodies(path, value)):
        answer = client.post(path, json=body)
        assert answer.status_code < 500, (body, answer.text)


def bodies(path: str, value: Any) -> Iterator[Any]:
    """Requests for the route, each with the value in another place."""
    yield value
    if path.startswith("/v2/"):
        tensor = {"name": "in", "shape": [1, 2], "datatype": "BYTES", "data": [72, 105]}
        body = {"id": "7", "inputs": [tensor], "outputs": [{"name": "out"}], "parameters": {"max_new_tokens": 1}}
        for name in tensor:
            yield {**body, "inputs": [{**tensor, name: value}]}
    else:
        body = {"inputs": INPUTS, "parameters": {"max_new_tokens": 1}}
        for name in schemas.Parameters.__struct_fields__:
            changed = {**body, "parameters": {"max_new_tokens": 1, name: value}}
            yield {"instances": [changed]} if path == "/vertex" else changed
        if path == "/vertex":
            yield {"instances": [value]}
            body = {"instances": body}
    for name in body:
        yield {**body, name: value}


def details(client: httpx.Client, **parameters: Any) -> Any:
    """The details of a greedy answer of up to 12 tokens, and its text as `text`."""
    body = {"inputs": INPUTS, "parameters": {"max_new_tokens": 12, "details": True, **parameters}}
    answer = client.post("/generate", json=body)
    assert answer.status_code == 200, answer.text
    return {**answer.json()["details"], "text": answer.json()["generated_text"]}


def refused(client: httpx.Client, *words: str, **parameters: Any) -> None:
    answer = client.post("/generate", json={"inputs": INPUTS, "parameters": parameters})
    assert (answer.status_code, answer.json()["error_type"]) == (422, "validation"), answer.text
    assert all(word in answer.json()["error"] for word in words), answer.text


def ids(found: Any) -> list[int]:
    return [token["id"] for token in found["tokens"]]


# --- Requests -----------------------------------------------------------------------------------------------


@shows("GenerateRequest.inputs", "CompatGenerateRequest.inputs")
def _(client: httpx.Client) -> None:
    bodies = [{"inputs": text, "parameters": {"return_full_text": False}} for text in ("one", "two")]
    for path in ("/generate", "/"):
        assert len({client.post(path, json=body).text for body in bodies}) == 2


@shows("GenerateRequest.parameters", "CompatGenerateRequest.parameters")
def _(client: httpx.Client) -> None:
    body = {"inputs": INPUTS, "parameters": {"max_new_tokens": 1, "details": True}}
    assert client.post("/generate", json=body).json()["details"]["generated_tokens"] == 1
    assert client.post("/", json=body).json()[0]["details"]["generated_tokens"] == 1


@shows("CompatGenerateRequest.stream")
def _(client: httpx.Client) -> None:
    body = {"inputs": INPUTS, "parameters": {"max_new_tokens": 1}}
    assert isinstance(client.post("/", json={**body, "stream": False}).json(), list)
    assert client.post("/", json={**body, "stream": True}).headers["content-type"] == "text/event-stream"


@shows("VertexRequest.instances")
def _(client: httpx.Client) -> None:
    instance = {"inputs": INPUTS, "parameters": {"max_new_tokens": 3}}
    assert len(client.post("/vertex", json={"instances": [instance] * 3}).json()["predictions"]) == 3


# --- Parameters ---------------------------------------------------------------------------------------------


@shows("Parameters.adapter_id")
def _(client: httpx.Client) -> None:
    refused(client, "`adapter_id`", "'my-lora'", adapter_id="my-lora")


@shows("Parameters.best_of")
def _(client: httpx.Client) -> None:
    assert len(details(client, best_of=2, do_sample=True)["best_of_sequences"]) == 1


@shows("Parameters.decoder_input_details")
def _(client: httpx.Client) -> None:
    assert len(details(client, decoder_input_details=True)["prefill"]) > 1


@shows("Parameters.details")
def _(client: httpx.Client) -> None:
    body = {"inputs": INPUTS, "parameters": {"max_new_tokens": 1, "details": False}}
    assert list(client.post("/generate", json=body).json()) == ["generated_text"]
    assert details(client)["generated_tokens"] == 12


@shows("Parameters.do_sample", "Parameters.seed")
def _(client: httpx.Client) -> None:
    first, again, other = (details(client, do_sample=True, seed=seed) for seed in (1, 1, 2))
    assert (first["seed"], ids(first)) == (1, ids(again))
    assert ids(first) != ids(other)
    assert details(client, seed=1)["seed"] is None, "greedy, which draws nothing"


@shows("Parameters.frequency_penalty")
def _(client: httpx.Client) -> None:
    plain, harsh = (details(client, max_new_tokens=200, frequency_penalty=value) for value in (None, 2))
    assert most_frequent(harsh) < most_frequent(plain)


@shows("Parameters.grammar")
def _(client: httpx.Client) -> None:
    assert details(client, grammar={"type": "regex", "value": "yes|no"})["text"] in ("yes", "no")
    for kind, value in (
        ("json", {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}),
        ("json", '{"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}'),
        ("json_object", {"properties": {"a": {"enum": [1, 2]}}, "type": "object", "required": ["a"]}),
        ("json_schema", {"name": "n", "strict": True, "schema": {"type": "object", "required": ["a"],
                                                               "properties": {"a": {"enum": [1, 2]}}}}),
    ):  # fmt: skip
        text = details(client, max_new_tokens=100, grammar={"type": kind, "value": value})["text"]
        assert json.loads(text)["a"] in (1, 2), text


@shows("Parameters.max_new_tokens")
def _(client: httpx.Client) -> None:
    assert [len(ids(details(client, max_new_tokens=n))) for n in (1, 7)] == [1, 7]


@shows("Parameters.repetition_penalty")
def _(client: httpx.Client) -> None:
    found = ids(details(client, repetition_penalty=100.0, max_new_tokens=40))
    assert len(set(found)) == len(found)


@shows("Parameters.return_full_text")
def _(client: httpx.Client) -> None:
    assert details(client, return_full_text=True)["text"] == INPUTS + details(client)["text"]
    body = {"inputs": INPUTS, "parameters": {"max_new_tokens": 2, "return_full_text": False}}
    assert not client.post("/", json=body).json()[0]["generated_text"].startswith(INPUTS)


@shows("Parameters.stop")
def _(client: httpx.Client) -> None:
    text = details(client)["text"]
    stopped = details(client, stop=[text[3]])
    assert (stopped["text"], stopped["finish_reason"]) == (text[: text.index(text[3]) + 1], "stop_sequence")


@shows("Parameters.temperature")
def _(client: httpx.Client) -> None:
    cold, hot = (details(client, temperature=value, seed=3) for value in (0.01, 50.0))
    assert ids(cold) == ids(details(client)) != ids(hot)


@shows("Parameters.top_k", "Parameters.top_p", "Parameters.typical_p")
def _(client: httpx.Client) -> None:
    for name, most in (("top_k", 1), ("top_p", 1e-6)):
        assert ids(details(client, do_sample=True, seed=5, **{name: most})) == ids(details(client)), name
    first, second = (details(client, do_sample=True, seed=seed, typical_p=1e-6) for seed in (1, 2))
    assert ids(first) == ids(second), "one candidate is left, so the seed cannot matter"


@shows("Parameters.top_n_tokens")
def _(client: httpx.Client) -> None:
    assert [len(tops) for tops in details(client, top_n_tokens=4)["top_tokens"]] == [4] * 12


@shows("Parameters.truncate")
def _(client: httpx.Client) -> None:
    assert len(details(client, truncate=2, decoder_input_details=True)["prefill"]) == 2


@shows("Parameters.watermark")
def _(client: httpx.Client) -> None:
    refused(client, "`watermark`", "set it to false", watermark=True)
    assert ids(details(client, watermark=False)) == ids(details(client))


def most_frequent(found: Any) -> int:
    return max(ids(found).count(token_id) for token_id in ids(found))


# --- KServe -------------------------------------------------------------------------------------------------


def infer(client: httpx.Client, **changes: Any) -> httpx.Response:
    tensor = {"name": "in", "shape": [1, 2], "datatype": "BYTES", "data": list(INPUTS.encode())}
    body = {"id": "7", "inputs": [tensor], "outputs": [{"name": "out"}], "parameters": {"max_new_tokens": 4}}
    return client.post("/v2/models/m/versions/1/infer", json={**body, **changes})


@shows("InferRequest.id", "InferRequest.inputs", "InferRequest.outputs", "AskedOutput.name", "InferInput.data")
def _(client: httpx.Client) -> None:
    answer = infer(client, id="another").json()
    (output,) = answer["outputs"]
    assert (answer["id"], output["name"], output["datatype"]) == ("another", "out", "BYTES")
    body = {"inputs": INPUTS, "parameters": {"max_new_tokens": 4}}
    text = client.post("/generate", json=body).json()["generated_text"]
    assert bytes(output["data"]).decode() == text
    assert output["shape"] == [1, len(output["data"])]


@shows("InferRequest.parameters")
def _(client: httpx.Client) -> None:
    def num_bytes(n: int) -> int:
        return len(infer(client, parameters={"max_new_tokens": n}).json()["outputs"][0]["data"])

    assert num_bytes(1) < num_bytes(20)
    refusal = infer(client, parameters={"top_p": 2})
    assert (refusal.status_code, refusal.json()["error_type"]) == (422, "validation")


@shows("InferInput.name", "InferInput.shape", "InferInput.datatype")
def _(client: httpx.Client) -> None:
    """Required by the protocol; the data speaks for itself."""
    tensor = {"name": "in", "shape": [1, 2], "datatype": "BYTES", "data": [72, 105]}
    for name in ("name", "shape", "datatype"):
        answer = infer(client, inputs=[{key: value for key, value in tensor.items() if key != name}])
        assert answer.status_code == 422 and name in answer.json()["error"]


# --- All of them --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(CHECKS))
def test_a_field_acts_or_is_refused(name: str, client: httpx.Client) -> None:
    CHECKS[name](client)
