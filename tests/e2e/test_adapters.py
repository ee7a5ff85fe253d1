"""LoRA adapters from TGI's flag to the text: a server of its own process, peft's files, peft's own texts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import transformers

from helpers.peft_adapters import peft_greedy, write_peft_adapter
from helpers.server_process import ServerProcess, server_process

DEMO = Path(__file__).parents[2] / "models" / "demo"
QUESTIONS = ("What is Tokenplane?", "Hello!", "What is a LoRA?")
NUM_TOKENS = 24


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random adapters by name, written by peft."""
    folder = tmp_path_factory.mktemp("adapters")
    return {
        name: write_peft_adapter(
            DEMO, folder / name, seed, scale=0.1, r=rank, lora_alpha=16, target_modules="all-linear"
        )
        for seed, (name, rank) in enumerate((("sober", 4), ("cheerful", 8), ("late", 2)))
    }


@pytest.fixture(scope="module")
def expected(adapters: dict[str, Path]) -> dict[tuple[str, str], str]:
    """(adapter or "tgi", question) -> the greedy text by peft, or by transformers."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO)
    texts = {}
    for name, adapter in {"tgi": None, **adapters}.items():
        for question in QUESTIONS if name != "late" else QUESTIONS[:1]:
            messages = [{"role": "user", "content": question}]
            prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
            ids = peft_greedy(DEMO, adapter, prompt, NUM_TOKENS)
            texts[name, question] = tokenizer.decode(ids, skip_special_tokens=True)
    return texts


@pytest.fixture(scope="module")
def server(adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    named = f"sober={adapters['sober']}, cheerful={adapters['cheerful']}"
    flags = ("--backend", "cpu", "--dtype", "float32", "--lora-adapters", named, "--allow-runtime-lora")
    with server_process(DEMO, tmp_path_factory.mktemp("server"), *flags) as running:
        yield running


@pytest.fixture
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, model: str, question: str) -> str:
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=NUM_TOKENS,
        extra_body={"ignore_eos": True},
    )
    assert answer.model == (model if model != "tgi" else str(DEMO))
    return str(answer.choices[0].message.content)


def test_mixed_requests_get_the_texts_of_peft(client: openai.OpenAI, expected: dict[tuple[str, str], str]) -> None:
    asked = [(name, question) for name in ("tgi", "sober", "cheerful") for question in QUESTIONS]
    assert len({expected[pair] for pair in asked}) == len(asked), "the adapters change nothing"
    with ThreadPoolExecutor(len(asked)) as pool:
        texts = list(pool.map(lambda pair: ask(client, *pair), asked * 2))
    assert texts == [expected[pair] for pair in asked] * 2


def test_one_comes_and_goes_while_others_are_busy(
    client: openai.OpenAI, adapters: dict[str, Path], expected: dict[tuple[str, str], str]
) -> None:
    asked = [(name, question) for name in ("tgi", "sober", "cheerful") for question in QUESTIONS]
    with ThreadPoolExecutor(len(asked)) as pool:
        busy = [pool.submit(ask, client, *pair) for pair in asked]
        client.post("/load_lora_adapter", body={"lora_name": "late", "lora_path": str(adapters["late"])}, cast_to=str)
        assert ask(client, "late", QUESTIONS[0]) == expected["late", QUESTIONS[0]]
        more = [pool.submit(ask, client, *pair) for pair in asked]
        client.post("/unload_lora_adapter", body={"lora_name": "late"}, cast_to=str)
        with pytest.raises(openai.NotFoundError, match="`late` does not exist here"):
            ask(client, "late", QUESTIONS[0])
        assert [future.result() for future in busy + more] == [expected[pair] for pair in asked] * 2
    listed = {model.id: (model.model_extra or {}).get("parent") for model in client.models.list()}
    assert listed == {str(DEMO): None, "sober": str(DEMO), "cheerful": str(DEMO)}


def test_the_log_says_what_is_served(server: ServerProcess) -> None:
    assert "adapter sober: loaded from" in server.log
    assert "6 of rank 16, beside every linear layer" in server.log
    assert re.search(r"--max-loras +6  2 named at the start$", server.log, re.MULTILINE)
    assert re.search(r"--max-lora-rank +16  the largest of them, 16 at least$", server.log, re.MULTILINE)
