"""TGI's own Python client against a server process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from helpers.model_folder import make_text_model
from helpers.server_process import ServerProcess, server_process

text_generation = pytest.importorskip(
    "text_generation",
    reason="TGI's client asks for huggingface-hub < 1, so it is installed apart: pip install --no-deps text-generation",
)

# It speaks pydantic 1.
pytestmark = pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20")

PROMPT = "What is the capital of France?"
REGEX = "yes|no"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = make_text_model(tmp_path_factory.mktemp("model") / "tiny-chat")
    flags = ("--backend", "simulated-cuda", "--max-concurrent-requests", "2")
    environment = {"TOKENPLANE_SIMULATED_STEP_MS": "5"}
    with server_process(folder, tmp_path_factory.mktemp("log"), *flags, **environment) as running:
        yield running


@pytest.fixture
def tgi(server: ServerProcess) -> object:
    return text_generation.Client(server.url)


def test_generate(tgi: text_generation.Client) -> None:
    answer = tgi.generate(PROMPT, max_new_tokens=8, decoder_input_details=True, top_n_tokens=3)
    details = answer.details
    assert details.finish_reason == "length"
    assert details.generated_tokens == len(details.tokens) == len(details.top_tokens) == 8
    assert "".join(token.text for token in details.tokens) == answer.generated_text
    assert "".join(token.text for token in details.prefill) == PROMPT
    assert [token.logprob is None for token in details.prefill] == [True] + [False] * (len(details.prefill) - 1)


def test_generate_with_every_parameter(tgi: text_generation.Client) -> None:
    answer = tgi.generate(
        PROMPT,
        do_sample=True,
        max_new_tokens=5,
        best_of=2,
        repetition_penalty=1.1,
        frequency_penalty=0.1,
        return_full_text=True,
        stop_sequences=["\n\n"],
        temperature=0.8,
        top_k=30,
        top_p=0.9,
        truncate=20,
        typical_p=0.95,
        decoder_input_details=True,
        top_n_tokens=2,
    )
    assert answer.generated_text.startswith(PROMPT)
    assert len(answer.details.best_of_sequences) == 1
    grammar = {"type": "regex", "value": REGEX}
    assert tgi.generate(PROMPT, seed=7, do_sample=True, grammar=grammar).generated_text in REGEX.split("|")


def test_generate_stream(tgi: text_generation.Client) -> None:
    whole = tgi.generate(PROMPT, max_new_tokens=8)
    events = list(tgi.generate_stream(PROMPT, max_new_tokens=8))
    assert [event.token for event in events] == whole.details.tokens
    assert [event.generated_text for event in events] == [None] * 7 + [whole.generated_text]
    assert events[-1].details.generated_tokens == 8


async def test_the_asynchronous_client(server: ServerProcess) -> None:
    tgi = text_generation.AsyncClient(server.url)
    whole = await tgi.generate(PROMPT, max_new_tokens=4)
    texts = [event.token.text async for event in tgi.generate_stream(PROMPT, max_new_tokens=4)]
    assert "".join(texts) == whole.generated_text


# Its chat stream wants a `tool_calls` key in every delta, which TGI itself does not send.
def test_chat(tgi: text_generation.Client) -> None:
    answer = tgi.chat([{"role": "user", "content": PROMPT}], max_tokens=5, temperature=0.5, seed=1)
    assert answer.usage["completion_tokens"] == 5
    assert answer.choices[0].message.content


def test_a_validation_error_has_its_class(tgi: text_generation.Client) -> None:
    from text_generation.errors import ValidationError

    with pytest.raises(ValidationError, match="top_n_tokens"):
        tgi.generate(PROMPT, top_n_tokens=100)
    with pytest.raises(ValidationError, match="top_n_tokens"):
        list(tgi.generate_stream(PROMPT, top_n_tokens=100))


def test_an_overload_has_its_class(tgi: text_generation.Client, server: ServerProcess) -> None:
    from text_generation.errors import OverloadedError

    long = {"type": "regex", "value": "[a-z]{400}"}
    busy = [tgi.generate_stream(PROMPT, max_new_tokens=400, grammar=long) for _ in range(2)]
    try:
        for stream in busy:
            next(stream)
        with pytest.raises(OverloadedError):
            tgi.generate(PROMPT)
    finally:
        for stream in busy:
            stream.close()
