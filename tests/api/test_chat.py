"""/v1/chat/completions as the real OpenAI client sees it."""

from __future__ import annotations

import math
from typing import Any

import httpx
import openai
import pytest

from helpers.live_server import MODEL_ID, LiveServer

MESSAGES: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a block?"}]


def chat(client: openai.OpenAI, **options: Any) -> Any:
    defaults: dict[str, Any] = {"model": MODEL_ID, "messages": MESSAGES, "max_tokens": 12, "temperature": 0}
    return client.chat.completions.create(**{**defaults, **options})


def test_an_answer_names_the_model_and_counts_its_tokens(openai_client: openai.OpenAI, server: LiveServer) -> None:
    answer = chat(openai_client)
    turns = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is a block?<|im_end|>\n"
    prompt = turns + "<|im_start|>assistant\n"
    num_prompt_tokens = len(server.service.tokenizer.encode(prompt, add_special_tokens=False))
    assert answer.id.startswith("chatcmpl-")
    assert answer.object == "chat.completion"
    assert answer.model == MODEL_ID
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (num_prompt_tokens, 12)
    assert answer.usage.total_tokens == num_prompt_tokens + 12


def test_ids_differ(openai_client: openai.OpenAI) -> None:
    assert chat(openai_client).id != chat(openai_client).id


@pytest.mark.parametrize("name", [None, "", "tgi", "dummy", MODEL_ID, "tiny-chat"])
def test_the_model_answers_to_its_names_and_says_the_real_one(client: httpx.Client, name: str | None) -> None:
    body = {"model": name, "messages": MESSAGES, "max_tokens": 1}
    answer = client.post("/v1/chat/completions", json={k: v for k, v in body.items() if v is not None})
    assert answer.json()["model"] == MODEL_ID


def test_another_model_is_not_found(openai_client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as failure:
        chat(openai_client, model="gpt-4o")
    assert failure.value.code == "model_not_found"
    assert "gpt-4o" in failure.value.message and MODEL_ID in failure.value.message


def test_a_stream_is_the_answer_in_pieces(openai_client: openai.OpenAI) -> None:
    whole = chat(openai_client, max_tokens=40)
    chunks = list(chat(openai_client, max_tokens=40, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.object == "chat.completion.chunk" and chunk.model == MODEL_ID for chunk in chunks)


def test_the_role_comes_once_and_first(openai_client: openai.OpenAI) -> None:
    chunks = list(chat(openai_client, stream=True))
    assert [chunk.choices[0].delta.role for chunk in chunks] == ["assistant"] + [None] * (len(chunks) - 1)


def test_usage_is_streamed_only_when_asked_for(openai_client: openai.OpenAI) -> None:
    silent = list(chat(openai_client, stream=True))
    assert all(chunk.usage is None and len(chunk.choices) == 1 for chunk in silent)
    options = {"include_usage": True, "include_obfuscation": False}
    *chunks, last = chat(openai_client, stream=True, stream_options=options)
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == []
    assert last.usage.completion_tokens == 12
    assert last.usage.total_tokens == last.usage.prompt_tokens + 12


def test_stream_framing_is_exact(client: httpx.Client) -> None:
    body = {"messages": MESSAGES, "max_tokens": 3, "stream": True}
    with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        raw = answer.read().decode()
    assert answer.headers["content-type"] == "text/event-stream"
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"
    *events, end = raw.split("\n\n")
    assert end == ""
    assert all(event.startswith("data: ") and "\n" not in event for event in events)
    assert events[-1] == "data: [DONE]"


def test_a_stop_string_is_stripped_and_ends_the_answer(openai_client: openai.OpenAI) -> None:
    text = chat(openai_client, max_tokens=60).choices[0].message.content
    stop = text[len(text) // 2 :][:3]
    at = text.index(stop)
    for options in ({"stop": stop}, {"stop": ["never to be seen", stop]}):
        choice = chat(openai_client, max_tokens=60, **options).choices[0]
        assert (choice.message.content, choice.finish_reason) == (text[:at], "stop")
        chunks = list(chat(openai_client, max_tokens=60, stream=True, **options))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text[:at]
        assert chunks[-1].choices[0].finish_reason == "stop"


def test_a_stop_string_ends_the_work_too(openai_client: openai.OpenAI, server: LiveServer) -> None:
    text = chat(openai_client, max_tokens=20).choices[0].message.content
    answer = chat(openai_client, max_tokens=1500, stop=text[:2], extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens < 20
    server.wait_idle()


def test_eos_ends_with_stop_and_stays_out_of_the_text(openai_client: openai.OpenAI) -> None:
    biased = {"logit_bias": {"2": 100}}
    answer = chat(openai_client, logprobs=True, **biased)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("", "stop")
    assert answer.usage.completion_tokens == 1
    assert answer.choices[0].logprobs.content == []


def test_min_tokens_and_ignore_eos_keep_it_going(openai_client: openai.OpenAI) -> None:
    biased = {"logit_bias": {"2": 100}, "max_tokens": 8}
    kept = chat(openai_client, **biased, extra_body={"min_tokens": 5})
    assert kept.usage.completion_tokens == 6
    ignored = chat(openai_client, **biased, extra_body={"ignore_eos": True})
    assert (ignored.usage.completion_tokens, ignored.choices[0].finish_reason) == (8, "length")


def test_a_seed_repeats_and_choices_differ(openai_client: openai.OpenAI) -> None:
    def texts(**options: Any) -> list[str]:
        return [choice.message.content for choice in chat(openai_client, temperature=1, n=3, **options).choices]

    assert texts(seed=7) == texts(seed=7)
    assert len(set(texts(seed=7))) == 3
    assert texts(seed=7) != texts(seed=100)
    assert texts(seed=7)[1] == texts(seed=8)[0], "choice i has the seed of the request plus i"


def test_without_temperature_it_samples(openai_client: openai.OpenAI) -> None:
    answers = {chat(openai_client, temperature=None).choices[0].message.content for _ in range(4)}
    assert len(answers) > 1


def test_choices_are_in_index_order_and_the_prompt_counts_once(openai_client: openai.OpenAI) -> None:
    one, three = chat(openai_client), chat(openai_client, n=3)
    assert [choice.index for choice in three.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in three.choices}) == 1, "greedy choices are equal"
    assert three.usage.prompt_tokens == one.usage.prompt_tokens
    assert three.usage.completion_tokens == 36


def test_streamed_choices_carry_their_index(openai_client: openai.OpenAI) -> None:
    whole = chat(openai_client, temperature=1, seed=3, n=3)
    texts, finishes = ["", "", ""], ["", "", ""]
    for chunk in chat(openai_client, temperature=1, seed=3, n=3, stream=True):
        choice = chunk.choices[0]
        texts[choice.index] += choice.delta.content or ""
        finishes[choice.index] = choice.finish_reason or finishes[choice.index]
    assert texts == [choice.message.content for choice in whole.choices]
    assert finishes == [choice.finish_reason for choice in whole.choices]


def test_logprobs_cover_the_text_byte_for_byte(openai_client: openai.OpenAI) -> None:
    choice = chat(openai_client, max_tokens=30, logprobs=True, top_logprobs=3).choices[0]
    entries = choice.logprobs.content
    assert bytes(byte for entry in entries for byte in entry.bytes).decode(errors="replace") == choice.message.content
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob <= 0 and math.isfinite(entry.logprob)
        best = [top.logprob for top in entry.top_logprobs]
        assert best == sorted(best, reverse=True)
        assert entry.top_logprobs[0].token == entry.token, "greedy takes the best"
        assert entry.top_logprobs[0].logprob == pytest.approx(entry.logprob)


def test_logprobs_without_top_logprobs_are_of_the_drawn_token_only(openai_client: openai.OpenAI) -> None:
    entries = chat(openai_client, logprobs=True).choices[0].logprobs.content
    assert all(entry.top_logprobs == [] for entry in entries)
    assert chat(openai_client).choices[0].logprobs is None


def test_streamed_logprobs_are_those_of_the_whole_answer(openai_client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"max_tokens": 30, "logprobs": True, "top_logprobs": 2}
    whole = chat(openai_client, **options).choices[0].logprobs.content
    streamed = [
        entry
        for chunk in chat(openai_client, **options, stream=True)
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert streamed == whole


def test_logprobs_end_where_a_stop_string_cuts(openai_client: openai.OpenAI) -> None:
    text = chat(openai_client, max_tokens=60).choices[0].message.content
    stop = text[len(text) // 2 :][:3]
    for stream in (False, True):
        answer = chat(openai_client, max_tokens=60, logprobs=True, stop=stop, stream=stream)
        choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
        entries = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content]
        shown = bytes(byte for entry in entries for byte in entry.bytes).decode(errors="replace")
        kept = text[: text.index(stop)]
        assert shown.startswith(kept)
        assert len(shown) < len(kept) + 12, "at most the rest of the token that the cut goes through"


def test_openai_logprobs_are_raw_whatever_the_temperature(openai_client: openai.OpenAI) -> None:
    cold = chat(openai_client, max_tokens=1, logprobs=True).choices[0].logprobs.content[0]
    hot = chat(openai_client, max_tokens=1, logprobs=True, top_logprobs=1, temperature=2, seed=1)
    assert hot.choices[0].logprobs.content[0].top_logprobs[0].logprob == pytest.approx(cold.logprob)


def test_content_parts_are_joined(client: httpx.Client) -> None:
    def choices(content: Any) -> Any:
        body = {"max_tokens": 5, "temperature": 0, "messages": [{"role": "user", "content": content}]}
        return client.post("/v1/chat/completions", json=body).json()["choices"]

    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "a block?"}]
    assert choices(parts) == choices("What is a block?")


def test_a_final_assistant_message_is_continued(client: httpx.Client) -> None:
    messages = [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "one two"}]
    prompt = "<|im_start|>user\nCount.<|im_end|>\n<|im_start|>assistant\none two"
    body: dict[str, Any] = {"max_tokens": 6, "temperature": 0}
    continued = client.post("/v1/chat/completions", json={**body, "messages": messages}).json()
    completed = client.post("/v1/completions", json={**body, "prompt": prompt}).json()
    assert continued["choices"][0]["message"]["content"] == completed["choices"][0]["text"]
    body |= {"messages": messages, "continue_final_message": False}
    fresh = client.post("/v1/chat/completions", json=body).json()
    assert fresh["usage"]["prompt_tokens"] > continued["usage"]["prompt_tokens"]


def test_absent_max_tokens_fills_the_context(openai_client: openai.OpenAI, server: LiveServer) -> None:
    answer = chat(openai_client, max_tokens=None, extra_body={"ignore_eos": True})
    assert answer.choices[0].finish_reason == "length"
    assert server.service.limits is not None
    assert answer.usage.total_tokens == server.service.limits.max_total_tokens


def test_max_completion_tokens_is_the_newer_name(openai_client: openai.OpenAI) -> None:
    assert chat(openai_client, max_tokens=None, max_completion_tokens=4).usage.completion_tokens == 4


def test_a_repeated_prompt_is_counted_as_cached(openai_client: openai.OpenAI) -> None:
    chat(openai_client)
    usage = chat(openai_client).usage
    assert 0 < usage.prompt_tokens_details.cached_tokens <= usage.prompt_tokens


def test_neutral_values_of_unsupported_fields_are_accepted(client: httpx.Client) -> None:
    neutral: dict[str, Any] = {
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "logit_bias": {},
        "stop": [],
        "n": 1,
        "user": "u-1",
        "metadata": {"team": "a"},
        "store": False,
        "service_tier": "auto",
        "parallel_tool_calls": True,
        "seed": None,
        "stream_options": None,
        "prompt_cache_retention": "24h",
    }
    answer = client.post("/v1/chat/completions", json={"messages": MESSAGES, "max_tokens": 1, **neutral})
    assert answer.status_code == 200, answer.text


def test_response_headers_tell_what_it_cost(client: httpx.Client) -> None:
    answer = client.post("/v1/chat/completions", json={"messages": MESSAGES, "max_tokens": 4})
    usage = answer.json()["usage"]
    assert int(answer.headers["x-prompt-tokens"]) == usage["prompt_tokens"]
    assert int(answer.headers["x-generated-tokens"]) == usage["completion_tokens"]
    assert answer.headers["x-compute-type"] == "1-simulated-cuda"
    assert float(answer.headers["x-compute-time"]) > 0
    for name in ("total", "validation", "queue", "inference"):
        assert int(answer.headers[f"x-{name}-time"]) >= 0
    assert len(answer.headers["x-request-id"]) > 8


def test_models_are_listed(openai_client: openai.OpenAI) -> None:
    assert [model.id for model in openai_client.models.list()] == [MODEL_ID]
    assert openai_client.models.retrieve(MODEL_ID).id == MODEL_ID
    with pytest.raises(openai.NotFoundError):
        openai_client.models.retrieve("gpt-4o")
