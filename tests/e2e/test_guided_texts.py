"""What comes out under a grammar keeps it: with a real model and tokenizer, in one engine, without HTTP."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jsonschema
import msgspec
import pytest
from tokenizers import Tokenizer

from helpers.json_schemas import Schema, json_schemas
from tokenplane_api.structured import from_choice, from_lark, from_regex, from_schema, tool_call_grammar
from tokenplane_core.backend.plugins import load_plugin
from tokenplane_core.engine.grammar import LLGrammars
from tokenplane_core.kit.runner import LocalEngine, Outcome
from tokenplane_core.messages import Grammar, SamplingParams
from tokenplane_core.model import describe_model

FOLDER = Path(__file__).parents[2] / "models" / "demo"
TOKENIZER = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
STOP = TOKENIZER.get_vocab()["<|im_end|>"]
PROMPTS = [TOKENIZER.encode(f"<|im_start|>user\nGive me {thing} as JSON.<|im_end|>\n").ids for thing in "abcdefgh"]
HOT = SamplingParams(temperature=1.2)


def local_engine(backend: str = "cpu", **options: object) -> LocalEngine:
    model = describe_model(FOLDER, dtype="float32")
    grammars = LLGrammars(FOLDER, model.vocab_size)
    return LocalEngine(lambda: load_plugin(backend), model, backend, grammars=grammars, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def engine() -> Iterator[LocalEngine]:
    made = local_engine(max_sequences=16)
    yield made
    made.close()


def text(outcome: Outcome) -> str:
    assert not outcome.error, outcome.error
    return str(TOKENIZER.decode(outcome.token_ids))


def submit(
    engine: LocalEngine, grammar: Grammar | None, number: int, sampling: SamplingParams = HOT, tokens: int = 300
) -> str:
    prompt = PROMPTS[number % len(PROMPTS)]
    return engine.submit(prompt, tokens, seeded(sampling, number), [STOP], grammar=grammar)


def seeded(sampling: SamplingParams, seed: int) -> SamplingParams:
    return msgspec.structs.replace(sampling, seed=seed)


def check_valid(schema: Schema, outcome: Outcome) -> None:
    assert outcome.finish_reason == "stop_token", f"{outcome.finish_reason} {outcome.error}: {text(outcome)!r}"
    value = json.loads(text(outcome))
    kind = jsonschema.Draft202012Validator
    jsonschema.validate(value, schema, kind, format_checker=kind.FORMAT_CHECKER)


def test_200_schemas_are_kept_beside_free_rows_that_do_not_notice(engine: LocalEngine) -> None:
    """In batches of 16, half of them free. Few texts do not end in time: keys of their own making may be long."""
    schemas = json_schemas(200)
    free_alone = [engine.generate([prompt], 24)[0] for prompt in PROMPTS]
    guided, free = [], []
    for i, schema in enumerate(schemas):
        guided.append(submit(engine, from_schema(schema, "schema"), i))
        free.append(engine.submit(PROMPTS[i % len(PROMPTS)], 24))
    engine.run()
    unfinished = 0
    for schema, request_id in zip(schemas, guided, strict=True):
        outcome = engine.outcomes[request_id]
        if outcome.finish_reason == "length":
            unfinished += 1
        else:
            check_valid(schema, outcome)
    assert unfinished <= 10, f"{unfinished} of {len(schemas)} texts did not come to their end"
    for i, request_id in enumerate(free):
        assert engine.outcomes[request_id].token_ids == free_alone[i % len(PROMPTS)]


@pytest.mark.parametrize(
    "pattern",
    [
        r"[a-z]{3,9}",
        r"\d{4}-\d{2}-\d{2}",
        r"(yes|no|maybe) ?!",
        r"^[A-Z][a-z]+( [A-Z][a-z]+){1,2}$",
        r"[àéü]{2}",
        r"👍{1,3}",
    ],
)
def test_a_text_matches_its_regular_expression(pattern: str, engine: LocalEngine) -> None:
    bounded = submit(engine, from_regex(pattern, "regex"), 3)
    greedy = submit(engine, from_regex(pattern, "regex"), 4, SamplingParams())
    engine.run()
    for request_id in (bounded, greedy):
        outcome = engine.outcomes[request_id]
        assert outcome.finish_reason in ("stop_token", "length")
        matches = re.fullmatch(pattern, text(outcome))
        assert (matches is not None) or outcome.finish_reason == "length", text(outcome)


def test_a_text_is_one_of_the_choices(engine: LocalEngine) -> None:
    choices = ["yes", "no", 'say "no"', "naïve 👍", "a\nb", "yes and no"]
    ids = [submit(engine, from_choice(choices, "choice"), i, SamplingParams(temperature=3.0)) for i in range(16)]
    engine.run()
    texts = {text(engine.outcomes[i]) for i in ids}
    assert texts <= set(choices) and len(texts) > 1
    assert all(engine.outcomes[i].finish_reason == "stop_token" for i in ids)


def test_a_text_follows_a_lark_grammar(engine: LocalEngine) -> None:
    grammar = """
        start: sum
        sum: term (" + " term){1,3}
        term: NUMBER | "(" NUMBER " * " NUMBER ")"
        NUMBER: /[1-9][0-9]{0,2}/
    """
    ids = [submit(engine, from_lark(grammar, "grammar"), i) for i in range(4)]
    engine.run()
    term = r"([1-9][0-9]{0,2}|\([1-9][0-9]{0,2} \* [1-9][0-9]{0,2}\))"
    for request_id in ids:
        assert re.fullmatch(rf"{term}( \+ {term}){{1,3}}", text(engine.outcomes[request_id]))


def test_a_forced_tool_call_names_a_tool_and_keeps_its_schema(engine: LocalEngine) -> None:
    place = {"$defs": {"unit": {"enum": ["celsius", "kelvin"]}}, "type": "object", "required": ["unit", "days"]}
    place["properties"] = {"unit": {"$ref": "#/$defs/unit"}, "days": {"type": "integer", "minimum": 1, "maximum": 7}}
    tools = [{"name": "weather", "parameters": place}, {"name": "now"}]
    plain = [submit(engine, tool_call_grammar(tools), i) for i in range(6)]
    wrapped = submit(
        engine,
        tool_call_grammar(
            tools, before="<tool_call>\n", after="\n</tool_call>", between="</tool_call><tool_call>", max_calls=2
        ),
        9,
    )
    engine.run()
    inner = text(engine.outcomes[wrapped]).removeprefix("<tool_call>\n").removesuffix("\n</tool_call>")
    calls = [json.loads(text(engine.outcomes[i])) for i in plain]
    calls += [json.loads(call) for call in inner.split("</tool_call><tool_call>")]
    for call in calls:
        assert call["name"] in ("weather", "now") and set(call) == {"name", "arguments"}
        jsonschema.validate(call["arguments"], place if call["name"] == "weather" else {"maxProperties": 0})


def test_chunks_prefix_hits_and_preemption_change_no_guided_text(engine: LocalEngine) -> None:
    schemas = [schema for schema in json_schemas(60) if schema.get("type") == "object"][:8]
    grammars = [from_schema(schema, "schema") for schema in schemas]

    def texts(made: LocalEngine) -> list[list[int]]:
        ids = [submit(made, grammar, i, tokens=160) for i, grammar in enumerate(grammars)]
        made.run()
        return [made.outcomes[i].token_ids for i in ids]

    expected = texts(engine)
    assert texts(engine) == expected, "with prefix hits"
    for options in ({"max_step_tokens": 8, "max_sequences": 4}, {"kv_cache_tokens": 256, "max_sequences": 8}):
        other = local_engine(**options)  # type: ignore[arg-type]
        assert texts(other) == expected, options
        if "kv_cache_tokens" in options:
            assert other.engine.scheduler.num_preemptions > 0
        other.close()


@pytest.mark.parametrize("backend", ["simulated-cuda", "simulated-tpu", "simulated-gaudi", "simulated-neuron"])
def test_simulated_cards_keep_schemas_too(backend: str) -> None:
    """Their texts are noise, so only schemas without strings, which noise would not end."""
    schemas = [s for s in json_schemas(120) if "string" not in json.dumps(s) and "pattern" not in json.dumps(s)][:24]
    assert len(schemas) == 24
    engine = local_engine(backend)
    ids = [submit(engine, from_schema(schema, "schema"), i, SamplingParams()) for i, schema in enumerate(schemas)]
    engine.run()
    outcomes = [engine.outcomes[i] for i in ids]
    finished = [(s, o) for s, o in zip(schemas, outcomes, strict=True) if o.finish_reason != "length"]
    assert len(finished) >= 20
    for schema, outcome in finished:
        check_valid(schema, outcome)
    engine.close()


# --- Ends ---------------------------------------------------------------------------------------------------


def test_a_complete_text_ends_even_where_no_stop_token_may_be_drawn(engine: LocalEngine) -> None:
    yes = from_choice(["yes"], "choice")
    ignoring = engine.submit(PROMPTS[0], 50, grammar=yes)  # has no stop tokens at all
    waiting = engine.submit(PROMPTS[0], 50, SamplingParams(min_new_tokens=40), [STOP], grammar=yes)
    normal = engine.submit(PROMPTS[0], 50, stop_token_ids=[STOP], grammar=yes)
    engine.run()
    for request_id in (ignoring, waiting):
        assert engine.outcomes[request_id].finish_reason == "stop_token"
        assert text(engine.outcomes[request_id]) == "yes"
    assert engine.outcomes[normal].token_ids == [*engine.outcomes[ignoring].token_ids, STOP]


def test_a_text_that_may_go_on_does_so_until_min_new_tokens(engine: LocalEngine) -> None:
    request_id = engine.submit(
        PROMPTS[0], 60, SamplingParams(min_new_tokens=20), [STOP], grammar=from_regex("[ab]+", "")
    )
    engine.run()
    assert len(engine.outcomes[request_id].token_ids) > 20


def test_max_new_tokens_ends_a_text_in_the_middle(engine: LocalEngine) -> None:
    request_id = submit(engine, from_regex("[a-z]{100}", "regex"), 0, tokens=5)
    engine.run()
    assert engine.outcomes[request_id].finish_reason == "length"
    assert len(engine.outcomes[request_id].token_ids) == 5 and text(engine.outcomes[request_id]).isalpha()


def test_a_text_that_cannot_go_on_is_an_error_of_the_request(engine: LocalEngine) -> None:
    digits = {i: float("-inf") for token, i in TOKENIZER.get_vocab().items() if any(c.isdigit() for c in token)}
    stuck = engine.submit(PROMPTS[0], 20, SamplingParams(logit_bias=digits), [STOP], grammar=from_regex(r"x\d", ""))
    other = submit(engine, from_regex(r"x\d", "regex"), 1)
    engine.run()
    assert engine.outcomes[stuck].finish_reason == "error"
    assert "logit_bias bans them all" in engine.outcomes[stuck].error
    assert re.fullmatch(r"x\d", text(engine.outcomes[other]))


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (Grammar("json_schema", '{"type": "foo"}'), "Invalid type: foo"),
        (Grammar("json_schema", '{"$ref": "#/nowhere"}'), "'/nowhere' does not exist"),
        (Grammar("json_schema", "[" * 100_000), "cannot be compiled"),
        (Grammar("json_schema", '{"type": "integer", "multipleOf": 123456789}'), "make it simpler"),
        (Grammar("regex", "(ab"), "unclosed group"),
        (Grammar("regex", "(" * 100_000), "cannot be compiled"),
        (Grammar("lark", "start: nothing"), 'unknown name: "nothing"'),
        (Grammar("lark", "start: " + "(" * 50_000), "cannot be compiled"),
    ],
)
def test_a_bad_grammar_is_an_error_of_its_request_and_hurts_nobody(
    grammar: Grammar, message: str, engine: LocalEngine
) -> None:
    bad = engine.submit(PROMPTS[0], 8, grammar=grammar)
    good = engine.submit(PROMPTS[1], 8)
    engine.run()
    assert engine.outcomes[bad].finish_reason == "error" and message in engine.outcomes[bad].error
    assert len(engine.outcomes[good].token_ids) == 8


def test_others_are_served_while_a_grammar_is_compiled(engine: LocalEngine) -> None:
    slow = engine.submit(PROMPTS[0], 8, grammar=Grammar("json_schema", '{"type": "integer", "multipleOf": 234567891}'))
    fast = engine.submit(PROMPTS[1], 8)
    for _ in range(20):
        engine.step()
    assert len(engine.outcomes[fast].token_ids) == 8 and engine.outcomes[slow].finish_reason is None
    engine.cancel(slow)
    engine.run()
    assert engine.outcomes[slow].finish_reason is None, "a cancelled request gets no news"


def test_a_compiler_that_breaks_costs_its_request_only(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    once = from_regex("[a-c]{3}x", "regex")
    with monkeypatch.context() as broken:
        broken.setattr("sys.executable", "/nowhere/python")
        other = local_engine("simulated-cuda")
        bad, good = other.submit(PROMPTS[0], 9, grammar=once), other.submit(PROMPTS[1], 4)
        other.run()
    assert "does not work on this server" in other.outcomes[bad].error and "nowhere" in caplog.text
    assert len(other.outcomes[good].token_ids) == 4
    other.close()


def test_a_model_without_a_fast_tokenizer_refuses_grammars_with_a_sentence(tmp_path: Path) -> None:
    model = replace(describe_model(FOLDER), path=str(tmp_path))
    engine = LocalEngine(lambda: load_plugin("simulated-cuda"), model, grammars=LLGrammars(tmp_path, model.vocab_size))
    request_id = engine.submit([1], 4, grammar=from_regex("a", "regex"))
    engine.run()
    assert "no readable tokenizer.json" in engine.outcomes[request_id].error
    engine.close()
