"""What a newcomer does: serve models/demo on the CPU, talk to it, kill its engine, stop it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest

from helpers.server_process import ServerProcess, server_process

DEMO = Path(__file__).parents[2] / "models" / "demo"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("demo")
    with server_process(DEMO, folder, "--backend", "cpu", "--dtype", "float32") as running:
        yield running


@pytest.fixture
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, content: str, **options: object) -> str:
    answer = client.chat.completions.create(
        model="tgi",
        messages=[{"role": "user", "content": content}],
        temperature=0,
        **options,  # type: ignore[call-overload]
    )
    return str(answer.choices[0].message.content)


def test_it_greets_in_words(client: openai.OpenAI) -> None:
    text = ask(client, "Hello!")
    assert len(text.split()) >= 3 and text.isprintable()


def test_streaming_gives_the_same_text_in_pieces(client: openai.OpenAI) -> None:
    whole = ask(client, "What is Tokenplane?")
    stream = client.chat.completions.create(
        model="tgi",
        messages=[{"role": "user", "content": "What is Tokenplane?"}],
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == whole
    assert len([piece for piece in pieces if piece]) > 5
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens > 5


def test_requests_in_a_batch_answer_as_they_do_alone(client: openai.OpenAI) -> None:
    questions = [f"What is {i} plus {i + 1}?" for i in range(12)]
    alone = [ask(client, question) for question in questions]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda question: ask(client, question), questions))
    assert together == alone
    assert len(set(alone)) > 6


def test_a_seed_repeats_and_another_differs(client: openai.OpenAI) -> None:
    def sampled(seed: int) -> str:
        answer = client.completions.create(model="tgi", prompt="The", temperature=1.5, seed=seed, max_tokens=30)
        return answer.choices[0].text

    assert sampled(1) == sampled(1)
    assert len({sampled(seed) for seed in range(6)}) > 1


def test_a_killed_engine_is_replaced_and_no_stream_is_lost(server: ServerProcess, client: openai.OpenAI) -> None:
    """Signal 9 under load: not ready, then ready again, and every stream ends with the text it would have had."""
    options: dict[str, object] = {"max_tokens": 150, "extra_body": {"ignore_eos": True}}
    questions = [f"Tell me about number {i}." for i in range(8)]
    expected = [ask(client, question, **options) for question in questions]
    answers: list[str] = [""] * len(questions)

    def stream(index: int) -> None:
        for chunk in client.chat.completions.create(
            model="tgi",
            messages=[{"role": "user", "content": questions[index]}],
            temperature=0,
            stream=True,
            **options,  # type: ignore[call-overload]
        ):
            answers[index] += chunk.choices[0].delta.content or ""

    threads = [threading.Thread(target=stream, args=(i,)) for i in range(len(questions))]
    for thread in threads:
        thread.start()
    while not all(answers):
        time.sleep(0.01)
    os.kill(server.engine_pid(), signal.SIGKILL)
    server.wait_until(ready=False, limit_s=10)
    refused = httpx.post(f"{server.url}/generate", json={"inputs": "hello"})
    assert refused.status_code == 503 and "retry-after" in refused.headers
    assert httpx.get(f"{server.url}/live").status_code == 200
    server.wait_until(ready=True)
    for thread in threads:
        thread.join(timeout=120)
    assert answers == expected
    assert ask(client, "Hello!")


def test_stop_lets_requests_finish_and_leaves_no_process(tmp_path: Path) -> None:
    with server_process(DEMO, tmp_path, "--backend", "cpu") as server:
        engine_pid = server.engine_pid()
        body = {"inputs": "Hello", "parameters": {"max_new_tokens": 100, "do_sample": False}}
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(httpx.post, f"{server.url}/generate", json=body, timeout=60)
            time.sleep(0.1)
            server.process.send_signal(signal.SIGTERM)
            assert answer.result().status_code == 200
        assert server.process.wait(timeout=30) == 0, server.log
        assert not Path(f"/proc/{engine_pid}").exists()
