"""LoRA adapters on the wire: named by requests, listed, loaded and unloaded while others run, kept over a crash."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from helpers.live_server import MODEL_ID, LiveServer, live_server, wait_until
from tokenplane_api.adapters import AdapterPlan, parse_adapters, plan_adapters
from tokenplane_core.backend.errors import ConfigError
from tokenplane_core.kit.adapters import write_adapter
from tokenplane_core.kit.simulated import adapter_salt, oracle
from tokenplane_core.model import describe_model

PROMPT = "What is the capital of France?"


@pytest.fixture(scope="module")
def folders(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    scratch, model = tmp_path_factory.mktemp("adapters"), describe_model(model_folder)
    return {name: write_adapter(scratch / name, model, seed) for seed, name in enumerate(("red", "green", "blue"))}


@pytest.fixture
def server(model_folder: Path, folders: dict[str, Path]) -> Iterator[LiveServer]:
    """Holds red and green, and has room for one more."""
    adapters = {name: str(folders[name]) for name in ("red", "green")}
    engine = {"adapters": adapters, "max_adapters": 3, "max_adapter_rank": 8}
    with live_server(model_folder, engine=engine, allow_runtime_lora=True, step_ms=1) as live:
        yield live


@pytest.fixture
def client(server: LiveServer) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


def text_of(server: LiveServer, adapter: Path | None, num_tokens: int = 8) -> str:
    """What the simulated device must answer to PROMPT."""
    tokenizer = server.service.tokenizer
    prompt = tokenizer.encode(PROMPT)
    salt = adapter_salt(adapter) if adapter is not None else 0
    ids = oracle(prompt, num_tokens, server.service.engine.info.vocab_size, salt)
    assert not set(ids) & set(tokenizer.stop_token_ids), "the text ends early: take another prompt"
    return tokenizer.decode([*prompt, *ids])[len(tokenizer.decode(prompt)) :]


def complete(client: httpx.Client, model: str | None, **fields: Any) -> Any:
    body = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, "ignore_eos": True, **fields}
    return client.post("/v1/completions", json=body if model is None else {"model": model, **body})


def streamed(server: LiveServer, model: str, on_piece: Callable[[int], Any]) -> str:
    """A text of 400 tokens; on_piece is called with the number of each piece of it."""
    body = {"model": model, "prompt": PROMPT, "max_tokens": 400, "temperature": 0, "ignore_eos": True, "stream": True}
    pieces: list[str] = []
    with server.client() as client, client.stream("POST", "/v1/completions", json=body) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                pieces.append(json.loads(line[6:])["choices"][0]["text"])
                on_piece(len(pieces))
    return "".join(pieces)


class Streams:
    """Texts of 400 tokens, one for each model, read in threads; made when each has had its first pieces."""

    def __init__(self, server: LiveServer, models: Sequence[str]) -> None:
        begun = threading.Barrier(len(models) + 1, timeout=20)
        self.texts: dict[str, str] = {}

        def read(model: str) -> None:
            self.texts[model] = streamed(server, model, lambda number: begun.wait() if number == 5 else None)

        self.threads = {model: threading.Thread(target=read, args=(model,)) for model in models}
        for thread in self.threads.values():
            thread.start()
        begun.wait()

    def join(self) -> dict[str, str]:
        for thread in self.threads.values():
            thread.join(30)
        return self.texts


def load(client: httpx.Client, name: str, path: Path | str) -> httpx.Response:
    return client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path)})


def unload(client: httpx.Client, name: str) -> httpx.Response:
    return client.post("/v1/unload_lora_adapter", json={"lora_name": name})


def test_requests_choose_by_model_or_adapter_id(
    server: LiveServer, client: httpx.Client, folders: dict[str, Path]
) -> None:
    for name, folder in ((None, None), ("tgi", None), ("red", folders["red"]), ("green", folders["green"])):
        answer = complete(client, name).json()
        assert answer["choices"][0]["text"] == text_of(server, folder)
        assert answer["model"] == (name if folder else MODEL_ID)
    native = client.post("/generate", json={"inputs": PROMPT, "parameters": {"adapter_id": "red", "max_new_tokens": 8}})
    assert native.json()["generated_text"] == text_of(server, folders["red"])


def test_chat_and_responses_take_them_too(server: LiveServer) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        texts = set()
        for model in ("red", "green", MODEL_ID):
            question: Any = {"role": "user", "content": PROMPT}
            chat = client.chat.completions.create(model=model, messages=[question], max_tokens=12, temperature=0)
            stream = client.chat.completions.create(
                model=model, messages=[question], max_tokens=12, temperature=0, stream=True
            )
            chunks = list(stream)
            assert {chunk.model for chunk in chunks} == {chat.model} == {model}
            assert "".join(c.choices[0].delta.content or "" for c in chunks) == chat.choices[0].message.content
            answer = client.responses.create(model=model, input=PROMPT, max_output_tokens=16, temperature=0)
            assert answer.model == model
            texts.add((chat.choices[0].message.content, answer.output_text))
        assert len(texts) == 3


def test_they_are_listed_under_their_model(client: httpx.Client) -> None:
    listed = client.get("/v1/models").json()["data"]
    assert [(model["id"], model.get("parent")) for model in listed] == [
        (MODEL_ID, None),
        ("red", MODEL_ID),
        ("green", MODEL_ID),
    ]
    assert client.get("/v1/models/red").json() == listed[1]


def test_an_unknown_one_is_an_error_on_every_route(client: httpx.Client) -> None:
    for answer in (
        complete(client, "purple"),
        client.post("/v1/chat/completions", json={"model": "purple", "messages": [{"role": "user", "content": "?"}]}),
        client.post("/v1/responses", json={"model": "purple", "input": "?"}),
        client.get("/v1/models/purple"),
    ):
        assert answer.status_code == 404
        assert (answer.json()["error"]["code"], answer.json()["error"]["param"]) == ("model_not_found", "model")
    native = client.post("/generate", json={"inputs": PROMPT, "parameters": {"adapter_id": "purple"}})
    assert (native.status_code, native.json()["error_type"]) == (422, "validation")
    assert "`adapter_id` is 'purple'" in native.json()["error"] and "`red`, `green`" in native.json()["error"]


def test_one_is_loaded_and_unloaded_while_others_run(
    server: LiveServer, client: httpx.Client, folders: dict[str, Path]
) -> None:
    streams = Streams(server, [MODEL_ID, "red", "green"])
    assert unload(client, "red").text == "Success: LoRA adapter 'red' removed successfully."
    assert complete(client, "red").status_code == 404, "an unloaded adapter took a new request"
    assert load(client, "blue", folders["blue"]).text == "Success: LoRA adapter 'blue' added successfully."
    assert complete(client, "blue").json()["choices"][0]["text"] == text_of(server, folders["blue"])
    assert streams.threads["red"].is_alive(), "nothing ran meanwhile"
    paths = {MODEL_ID: None, "red": folders["red"], "green": folders["green"]}
    assert streams.join() == {name: text_of(server, path, 400) for name, path in paths.items()}
    wait_until(lambda: "tokenplane_adapters_loaded 2.0" in client.get("/metrics").text, 5, "red to be let go")
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == [MODEL_ID, "green", "blue"]


def test_a_name_may_come_back_as_another_adapter(
    server: LiveServer, client: httpx.Client, folders: dict[str, Path]
) -> None:
    assert complete(client, "red").json()["choices"][0]["text"] == text_of(server, folders["red"])
    assert unload(client, "red").status_code == load(client, "red", folders["blue"]).status_code == 200
    assert complete(client, "red").json()["choices"][0]["text"] == text_of(server, folders["blue"])


def test_what_cannot_be_loaded_says_why(
    client: httpx.Client, model_folder: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    large = write_adapter(tmp_path / "large", describe_model(model_folder), seed=9, rank=16)
    for name, path, field, why in (
        ("red", folders["blue"], "lora_name", "'red' is loaded already; unload it first"),
        (MODEL_ID, folders["blue"], "lora_name", "what requests call the model itself"),
        ("tgi", folders["blue"], "lora_name", "what requests call the model itself"),
        ("", folders["blue"], "lora_name", "is no name"),
        ("a\nb", folders["blue"], "lora_name", "is no name"),
        ("far", "/no/such/folder", "lora_path", "is no folder on the server"),
        ("empty", tmp_path, "lora_path", "has no adapter_config.json"),
        ("large", large, "lora_path", "has rank 16, the limit is 8"),
    ):
        answer = load(client, name, path)
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, field), answer.text
        assert why in error["message"]
    assert load(client, "blue", folders["blue"]).status_code == 200
    full = load(client, "one too many", folders["blue"])
    assert full.status_code == 400 and "3 adapters are loaded, the limit is 3 (--max-loras)" in full.text
    gone = unload(client, "purple")
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "model_not_found")


def test_a_new_engine_has_the_adapters_and_goes_on_with_their_streams(
    server: LiveServer, client: httpx.Client, folders: dict[str, Path]
) -> None:
    streams = Streams(server, ["red", "green"])
    unload(client, "red")  # its stream still runs, and must outlive the engine
    pid = server.service.engine.engine_pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    assert streams.join() == {name: text_of(server, folders[name], 400) for name in ("red", "green")}
    assert server.service.engine.num_restarts == 1
    assert complete(client, "green").json()["choices"][0]["text"] == text_of(server, folders["green"])
    assert complete(client, "red").status_code == 404
    wait_until(lambda: "tokenplane_adapters_loaded 1.0" in client.get("/metrics").text, 5, "red to be let go")


def test_an_adapter_that_is_gone_after_a_crash_is_no_longer_known(
    server: LiveServer, client: httpx.Client, model_folder: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    vanishing = write_adapter(tmp_path / "vanishing", describe_model(model_folder), seed=3)
    assert load(client, "vanishing", vanishing).status_code == 200
    (vanishing / "adapter_model.safetensors").unlink()
    pid = server.service.engine.engine_pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: server.service.engine.num_restarts == 1, 10, "a new engine")
    server.wait_ready()
    time.sleep(0.2)
    assert complete(client, "vanishing").status_code == 404
    assert complete(client, "green").json()["choices"][0]["text"] == text_of(server, folders["green"])


def test_bodies_of_the_wrong_kind_are_refused(client: httpx.Client) -> None:
    for value in (None, True, 7, 1e300, "", [], {}, "x" * 10_000, "\u0000", "\ud800"):
        for path, body in (
            ("load", {"lora_name": "a", "lora_path": value}),
            ("load", {"lora_name": value, "lora_path": "/no/such/folder"}),
            ("load", value),
            ("unload", {"lora_name": value}),
        ):
            content, headers = json.dumps(body).encode(), {"content-type": "application/json"}
            answer = client.post(f"/v1/{path}_lora_adapter", content=content, headers=headers)
            assert answer.status_code in (400, 404), answer.text
            assert "error" in answer.json()


def test_run_time_changes_must_be_allowed(model_folder: Path, folders: dict[str, Path]) -> None:
    with live_server(model_folder, engine={"max_adapters": 1, "max_adapter_rank": 8}) as live, live.client() as client:
        for answer in (load(client, "red", folders["red"]), unload(client, "red")):
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unsupported_endpoint")
            assert "--allow-runtime-lora" in answer.json()["error"]["message"]


def test_an_adapter_of_the_start_that_cannot_be_loaded_ends_it(model_folder: Path, tmp_path: Path) -> None:
    engine = {"adapters": {"empty": str(tmp_path)}, "max_adapters": 1, "max_adapter_rank": 8}
    with live_server(model_folder, engine=engine, wait_ready=False) as live:
        wait_until(lambda: live.service.starting().done(), 20, "the engine to give up")
        assert "adapter 'empty': " in str(live.service.starting().exception())
        assert "has no adapter_config.json" in str(live.service.starting().exception())


def test_a_device_without_adapters_refuses_to_start_with_them(model_folder: Path) -> None:
    engine = {"max_adapters": 1, "max_adapter_rank": 8}
    with live_server(model_folder, backend="simulated-neuron", engine=engine, wait_ready=False) as live:
        wait_until(lambda: live.service.starting().done(), 20, "the engine to give up")
        assert "simulated-neuron serves no LoRA adapters" in str(live.service.starting().exception())


def test_room_is_made_for_those_of_the_start_and_some_more(folders: dict[str, Path]) -> None:
    def plan(text: str, **fields: Any) -> AdapterPlan:
        options = {"max_adapters": None, "max_rank": None, "may_load_later": False, "hub_cache": None, **fields}
        return plan_adapters(parse_adapters(text), {"tgi"}, progress=print, **options)

    named = f"a={folders['red']},b={folders['blue']}"
    assert plan("") == AdapterPlan({}, 0, 0)
    assert plan(named) == AdapterPlan({"a": str(folders["red"]), "b": str(folders["blue"])}, 2, 16)
    assert plan(named, may_load_later=True).max_adapters == 6
    assert plan("", may_load_later=True, max_adapters=3, max_rank=8) == AdapterPlan({}, 3, 8)
    with pytest.raises(ConfigError, match="'tgi' is what requests call the model itself; call the adapter something"):
        plan(f"tgi={folders['red']}")
