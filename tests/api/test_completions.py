"""/v1/completions as the real OpenAI client sees it."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from helpers.live_server import MODEL_ID, LiveServer
from tokenplane_api.generation import PromptToken
from tokenplane_api.openai.completion_render import CompletionRenderer
from tokenplane_api.openai.convert import Prepared
from tokenplane_api.openai.render import Head


def complete(client: openai.OpenAI, **options: Any) -> Any:
    defaults: dict[str, Any] = {"model": MODEL_ID, "prompt": "A block of the cache", "max_tokens": 12, "temperature": 0}
    return client.completions.create(**{**defaults, **options})


def test_an_answer_has_text_and_usage(openai_client: openai.OpenAI, server: LiveServer) -> None:
    answer = complete(openai_client)
    assert answer.id.startswith("cmpl-")
    assert (answer.object, answer.model) == ("text_completion", MODEL_ID)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.prompt_tokens == len(server.service.tokenizer.encode("A block of the cache"))
    assert answer.usage.completion_tokens == 12


def test_a_stream_is_the_answer_in_pieces(openai_client: openai.OpenAI) -> None:
    whole = complete(openai_client, max_tokens=40)
    chunks = list(complete(openai_client, max_tokens=40, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert {chunk.choices[0].finish_reason for chunk in chunks[:-1]} == {None}
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert all(chunk.usage is None for chunk in chunks)


def test_streamed_usage_comes_last_and_without_choices(openai_client: openai.OpenAI) -> None:
    *chunks, last = complete(openai_client, stream=True, stream_options={"include_usage": True})
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)
    assert (last.choices, last.usage.completion_tokens) == ([], 12)


def test_token_ids_are_a_prompt_too(openai_client: openai.OpenAI, server: LiveServer) -> None:
    ids = server.service.tokenizer.encode("A block of the cache")
    text = complete(openai_client)
    assert complete(openai_client, prompt=ids).choices[0].text == text.choices[0].text
    two = complete(openai_client, prompt=[ids, ids[:2]])
    assert two.choices[0].text == text.choices[0].text
    assert two.usage.prompt_tokens == len(ids) + 2


def test_several_prompts_with_several_choices_are_in_order(openai_client: openai.OpenAI) -> None:
    prompts = ["The scheduler", "def step", "Paris"]
    singles = [complete(openai_client, prompt=prompt) for prompt in prompts]
    together = complete(openai_client, prompt=prompts, n=2)
    assert [choice.index for choice in together.choices] == list(range(6))
    assert [choice.text for choice in together.choices] == [s.choices[0].text for s in singles for _ in range(2)]
    assert together.usage.prompt_tokens == sum(single.usage.prompt_tokens for single in singles)
    assert together.usage.completion_tokens == 72
    texts = [""] * 6
    for chunk in complete(openai_client, prompt=prompts, n=2, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in together.choices]


def test_headers_of_several_prompts_are_sums(client: httpx.Client) -> None:
    body = {"prompt": ["The scheduler", "Paris"], "max_tokens": 3, "ignore_eos": True}
    answer = client.post("/v1/completions", json=body)
    assert answer.headers["x-compute-characters"] == str(len("The schedulerParis"))
    assert answer.headers["x-generated-tokens"] == "6"
    assert int(answer.headers["x-prompt-tokens"]) == answer.json()["usage"]["prompt_tokens"]


def test_logprobs_are_four_lists_side_by_side(openai_client: openai.OpenAI) -> None:
    choice = complete(openai_client, max_tokens=20, logprobs=2).choices[0]
    logprobs = choice.logprobs
    lists = (logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, logprobs.text_offset)
    assert len({len(column) for column in lists}) == 1
    assert logprobs.text_offset == sorted(logprobs.text_offset)
    assert logprobs.text_offset[0] == 0
    for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert top[token] == pytest.approx(logprob)
        assert logprob == pytest.approx(max(top.values())), "greedy takes the best"


def test_text_offsets_find_the_tokens_in_the_text(openai_client: openai.OpenAI) -> None:
    choice = complete(openai_client, max_tokens=60, logprobs=0, temperature=1, seed=5).choices[0]
    whole = [i for i, token in enumerate(choice.logprobs.tokens) if token.isascii() and token.isprintable()]
    assert whole
    for i in whole:
        start = choice.logprobs.text_offset[i]
        assert choice.logprobs.tokens[i] in choice.text[start : start + len(choice.logprobs.tokens[i]) + 1]


def test_streamed_logprobs_are_those_of_the_whole_answer(openai_client: openai.OpenAI) -> None:
    whole = complete(openai_client, max_tokens=30, logprobs=1).choices[0].logprobs
    chunks = [chunk.choices[0].logprobs for chunk in complete(openai_client, max_tokens=30, logprobs=1, stream=True)]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [item for chunk in chunks if chunk for item in getattr(chunk, name)] == getattr(whole, name)


def test_a_stop_string_split_over_tokens_is_found(openai_client: openai.OpenAI) -> None:
    text = complete(openai_client, max_tokens=60).choices[0].text
    for start in range(3, 20):
        stop = text[start : start + 9]
        choice = complete(openai_client, max_tokens=60, stop=stop).choices[0]
        assert (choice.text, choice.finish_reason) == (text[: text.index(stop)], "stop")


def test_penalties_and_bias_change_the_answer(openai_client: openai.OpenAI) -> None:
    plain = complete(openai_client).choices[0].text
    forced = complete(openai_client, max_tokens=3, logit_bias={"50": 100})
    assert len(set(forced.choices[0].text)) == 1, "the bias wins every draw"
    nudged = complete(openai_client, max_tokens=3, logit_bias={"50": 5}, presence_penalty=2)
    assert len(set(nudged.choices[0].text)) > 1, "after the first draw the penalty outweighs the bias"
    assert complete(openai_client, extra_body={"top_k": 1}, temperature=2).choices[0].text == plain
    assert complete(openai_client, extra_body={"min_p": 1.0}, temperature=2).choices[0].text == plain


def test_best_of_gives_the_likeliest_of_its_candidates(openai_client: openai.OpenAI) -> None:
    def mean_logprob(choice: Any) -> float:
        return sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs)

    for seed in range(5):
        options: dict[str, Any] = {"temperature": 1, "seed": seed, "extra_body": {"ignore_eos": True}}
        both = complete(openai_client, n=2, logprobs=0, **options)
        best = complete(openai_client, best_of=2, **options)
        assert best.choices[0].text == max(both.choices, key=mean_logprob).text
        assert (len(best.choices), best.choices[0].index, best.choices[0].logprobs) == (1, 0, None)
        assert best.usage == both.usage.model_copy(
            update={"prompt_tokens_details": best.usage.prompt_tokens_details}
        ), "what was generated counts, shown or not"


def test_best_of_works_prompt_by_prompt(openai_client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"temperature": 1, "seed": 3, "best_of": 2}
    singles = [complete(openai_client, prompt=prompt, **options).choices[0].text for prompt in ("Paris", "def step")]
    both = complete(openai_client, prompt=["Paris", "def step"], **options)
    assert [choice.text for choice in both.choices] == singles
    assert [choice.index for choice in both.choices] == [0, 1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"best_of": 3}, ["3", "2", "--max-best-of"]),
        ({"n": 2, "best_of": 1}, ["at least `n`"]),
        ({"best_of": 2, "stream": True}, ["stream"]),
        ({"best_of": 0}, ["at least 1"]),
    ],
    ids=str,
)
def test_best_of_has_its_limits(openai_client: openai.OpenAI, options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(openai.BadRequestError) as failure:
        complete(openai_client, **options)
    assert failure.value.param == "best_of"
    assert all(word in failure.value.message for word in words)


def test_best_of_equal_to_n_asks_for_nothing_more(openai_client: openai.OpenAI) -> None:
    assert len(complete(openai_client, n=5, best_of=5, stream=False).choices) == 5


def test_echo_puts_the_prompt_in_front(openai_client: openai.OpenAI, server: LiveServer) -> None:
    prompt = "A block of the cache"
    plain = complete(openai_client).choices[0].text
    for given in (prompt, server.service.tokenizer.encode(prompt)):
        assert complete(openai_client, prompt=given, echo=True).choices[0].text == prompt + plain
        chunks = complete(openai_client, prompt=given, echo=True, stream=True)
        assert "".join(chunk.choices[0].text for chunk in chunks) == prompt + plain
    several = complete(openai_client, prompt=["Paris", "def step"], echo=True, n=2)
    assert [choice.text[:5] for choice in several.choices] == ["Paris", "Paris", "def s", "def s"]


def test_echo_has_the_prompts_logprobs_too(openai_client: openai.OpenAI, server: LiveServer) -> None:
    prompt = "A block of the cache"
    num_prompt_tokens = len(server.service.tokenizer.encode(prompt))
    choice = complete(openai_client, echo=True, logprobs=0).choices[0]
    logprobs = choice.logprobs
    assert len(logprobs.tokens) == num_prompt_tokens + 12
    assert logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in logprobs.token_logprobs[1:])
    assert "".join(logprobs.tokens[:num_prompt_tokens]) == prompt
    assert logprobs.text_offset == sorted(logprobs.text_offset)
    assert logprobs.text_offset[num_prompt_tokens] == len(prompt)
    assert logprobs.top_logprobs[0] is None
    chunks = [chunk.choices[0].logprobs for chunk in complete(openai_client, echo=True, logprobs=0, stream=True)]
    for name in ("tokens", "token_logprobs", "text_offset"):
        assert [item for chunk in chunks if chunk for item in getattr(chunk, name)] == getattr(logprobs, name)


def test_echo_has_the_alternatives_of_the_prompts_tokens(openai_client: openai.OpenAI, server: LiveServer) -> None:
    """What evaluation harnesses ask for: was each token of the prompt the most likely one?"""
    prompt = "A block of the cache"
    ids = server.service.tokenizer.encode(prompt)
    logprobs = complete(openai_client, prompt=ids, echo=True, logprobs=3, max_tokens=1).choices[0].logprobs
    assert logprobs.top_logprobs[0] is None
    for place in range(1, len(ids)):
        best = logprobs.top_logprobs[place]
        assert best[logprobs.tokens[place]] == logprobs.token_logprobs[place]
        assert 3 <= len(best) <= 4
        drawn = complete(openai_client, prompt=ids[:place], logprobs=3, max_tokens=1).choices[0].logprobs
        assert max(best.values()) == pytest.approx(max(drawn.top_logprobs[0].values()), abs=2e-3)


@pytest.mark.parametrize("n", [1, 2])
def test_a_stop_token_has_its_entry(openai_client: openai.OpenAI, server: LiveServer, n: int) -> None:
    """Harnesses take the last entry for the one generated token, and those before it for the prompt's."""
    ids = server.service.tokenizer.encode("A block of the cache")
    eos = server.service.tokenizer.stop_token_ids[0]
    given = {"prompt": ids, "echo": True, "logprobs": 2, "max_tokens": 1, "n": n, "logit_bias": {str(eos): 100}}
    answer = complete(openai_client, **given)
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        assert choice.text == "A block of the cache"
        assert all(len(column) == len(ids) + 1 for _, column in choice.logprobs if column)
        assert choice.logprobs.text_offset[-1] == len(choice.text)
    assert answer.usage.completion_tokens == n
    lists: list[list[str]] = [[] for _ in range(n)]
    for chunk in complete(openai_client, **given, stream=True):
        if chunk.choices[0].logprobs:
            lists[chunk.choices[0].index] += chunk.choices[0].logprobs.tokens
    assert lists == [choice.logprobs.tokens for choice in answer.choices]
    alone = complete(openai_client, **{**given, "max_tokens": 0, "n": 1}).choices[0]
    assert alone.finish_reason == "length"
    assert len(alone.logprobs.tokens) == len(ids)


def test_echo_of_a_prompt_alone(openai_client: openai.OpenAI, server: LiveServer) -> None:
    prompt = "A block of the cache"
    whole = complete(openai_client, prompt=prompt, echo=True, logprobs=1, max_tokens=0)
    assert whole.choices[0].text == prompt
    assert whole.choices[0].finish_reason == "length"
    assert "".join(whole.choices[0].logprobs.tokens) == prompt
    assert whole.usage.completion_tokens == 0
    chunks = list(complete(openai_client, prompt=prompt, echo=True, logprobs=1, max_tokens=0, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == prompt
    assert [t for c in chunks if c.choices[0].logprobs for t in c.choices[0].logprobs.tokens] == (
        whole.choices[0].logprobs.tokens
    )
    assert complete(openai_client, prompt=prompt, echo=True, max_tokens=0).choices[0].text == prompt
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        complete(openai_client, prompt=prompt, max_tokens=0)


def test_an_alternative_with_the_text_of_the_prompts_own_token_is_not_lost() -> None:
    """The own token is the last byte of "é", shown as the whole character; the better one is a token "é"."""

    class Tokenizer:
        def token_text(self, token_id: int) -> str:
            return {7: "\ufffd", 8: "é", 9: "e"}[token_id]

    renderer = CompletionRenderer(Head("r", "m", "f", 0), [], Prepared(specs=[]), Tokenizer())  # type: ignore[arg-type]
    own = PromptToken(7, "é", -3.0, [(8, -0.1), (9, -2.0)])
    assert renderer._alternatives(own) == {"é": -3.0, "e": -2.0, "token_id:8": -0.1}
