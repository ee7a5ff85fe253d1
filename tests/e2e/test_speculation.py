"""`tokenplane serve --speculate`: the texts are those of a server without, and on text that repeats itself guesses are
right; guided texts, too."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import httpx
import pytest
from tokenizers import Tokenizer

from helpers.live_server import live_server, wait_until
from helpers.model_folder import make_text_model
from helpers.server_process import ServerProcess, server_process
from tokenplane_core.backend.plugins import load_plugin
from tokenplane_core.engine.grammar import LLGrammars
from tokenplane_core.engine.speculation import NgramDrafter
from tokenplane_core.kit.runner import LocalEngine
from tokenplane_core.messages import Grammar, SamplingParams
from tokenplane_core.model import describe_model

DEMO = Path(__file__).parents[2] / "models" / "demo"
TOKENIZER = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
LIST = "one two three four five six seven eight nine ten " * 6
SAMPLED = {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "repetition_penalty": 1.05, "seed": 4}


def demo_engine(max_drafts: int) -> LocalEngine:
    model = describe_model(DEMO, dtype="float32")
    return LocalEngine(
        lambda: load_plugin("cpu"),
        model,
        "cpu",
        max_drafts=max_drafts,
        drafter=NgramDrafter() if max_drafts else None,
        grammars=LLGrammars(DEMO, model.vocab_size),
    )


def generate(server: ServerProcess, **parameters: object) -> str:
    body = {"inputs": LIST, "parameters": {"max_new_tokens": 300, **parameters}}
    return str(httpx.post(f"{server.url}/generate", json=body, timeout=60).json()["generated_text"])


def outlived(server: ServerProcess) -> str:
    """The text of a stream whose engine dies under it."""
    body = {"inputs": LIST, "parameters": {"max_new_tokens": 300}}
    with httpx.stream("POST", f"{server.url}/generate_stream", json=body, timeout=60) as answer:
        lines = (line for line in answer.iter_lines() if line)
        next(lines)
        os.kill(server.engine_pid(), signal.SIGKILL)
        *_, last = lines
    return str(json.loads(last.removeprefix("data:"))["generated_text"])


def test_a_server_with_guesses_gives_the_texts_of_one_without(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    with server_process(DEMO, tmp_path / "plain", "--backend", "cpu", "--dtype", "float32") as server:
        plain = [generate(server), generate(server, **SAMPLED)]
    flags = ("--backend", "cpu", "--dtype", "float32", "--speculate", "3")
    with server_process(DEMO, tmp_path, *flags) as server:
        assert re.search(r"--speculate +3  as given", server.log)
        assert [generate(server), generate(server, **SAMPLED)] == plain
        wait_until(lambda: server.gauge("tokenplane_requests_finished_total") == 2, 5, "the engine's heartbeat")
        drafted, right = (server.gauge(f"tokenplane_draft_tokens{name}_total") for name in ("", "_accepted"))
        assert 60 < right < drafted
        assert server.gauge("tgi_request_skipped_tokens_sum") == right
        assert (
            server.gauge("tgi_request_skipped_tokens_count")
            == server.gauge("tokenplane_generated_tokens_total") - right
        )
        assert outlived(server) == plain[0]
        assert server.gauge("tokenplane_engine_restarts_total") == 1


@pytest.mark.parametrize("backend", ["simulated-gaudi", "simulated-neuron"])
def test_a_backend_that_verifies_none_refuses_to_start_with_them(backend: str, tmp_path: Path) -> None:
    with live_server(make_text_model(tmp_path), backend=backend, engine={"max_drafts": 2}, wait_ready=False) as live:
        wait_until(lambda: live.service.starting().done(), 20, "the engine to give up")
        said = str(live.service.starting().exception())
        assert f"--speculate is 2, but backend {backend} verifies no drafts; leave --speculate out" in said


GRAMMARS = (
    Grammar("regex", "(ab|cd){10,40}"),
    Grammar(
        "json_schema",
        json.dumps({"type": "array", "items": {"enum": ["left", "right"]}, "minItems": 12, "maxItems": 20}),
    ),
    Grammar("json_schema", json.dumps({"type": "array", "items": {"type": "integer"}, "minItems": 5, "maxItems": 30})),
    Grammar("lark", 'start: "yes"'),
    None,
)


def test_guided_texts_with_guesses_are_those_without() -> None:
    """Greedy and drawn, beside free rows; some end where their grammar does."""
    stop = TOKENIZER.get_vocab()["<|im_end|>"]
    prompt = TOKENIZER.encode(LIST).ids
    outcomes = []
    for max_drafts in (0, 4):
        engine = demo_engine(max_drafts)
        ids = [
            engine.submit(prompt, 60, SamplingParams(temperature=heat, seed=i), [stop], grammar=grammar)
            for heat in (0.0, 1.0)
            for i, grammar in enumerate(GRAMMARS)
        ]
        engine.run()
        engine.close()
        outcomes.append([(o.token_ids, o.finish_reason, o.error) for o in map(engine.outcomes.__getitem__, ids)])
    assert outcomes[0] == outcomes[1]
    assert {reason for _, reason, _ in outcomes[0]} == {"stop_token", "length"}
    assert engine.engine.stats.draft_tokens_accepted > 40
