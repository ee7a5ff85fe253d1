"""The demo checkpoint is complete, small, consistent, and free of what its evaluation asks. Needs no torch."""

import importlib
import json
import re
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

DEMO = Path(__file__).resolve().parents[2] / "models" / "demo"
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MAX_WEIGHTS_BYTES = 16 * 1024 * 1024


def read(name: str) -> Any:
    return json.loads((DEMO / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return pytest.importorskip("tokenizers").Tokenizer.from_file(str(DEMO / "tokenizer.json"))


@pytest.fixture
def evaluation(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module models/demo/evaluate.py, imported the way its own folder does."""
    pytest.importorskip("tokenizers")
    monkeypatch.syspath_prepend(str(DEMO))
    before = set(sys.modules)
    yield importlib.import_module("evaluate")
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(DEMO)):
            del sys.modules[name]


def tensor_shapes() -> dict[str, tuple[str, list[int]]]:
    """Name -> (dtype, shape) from the header of the weights file, which is JSON after its 8-byte length."""
    with (DEMO / "model.safetensors").open("rb") as file:
        (header_bytes,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(header_bytes))
    return {name: (entry["dtype"], entry["shape"]) for name, entry in header.items() if name != "__metadata__"}


def test_weights_are_small_and_bfloat16() -> None:
    assert (DEMO / "model.safetensors").stat().st_size <= MAX_WEIGHTS_BYTES
    assert {dtype for dtype, _ in tensor_shapes().values()} == {"BF16"}


def test_weights_have_the_shapes_of_the_config() -> None:
    config, shapes = read("config.json"), {name: shape for name, (_, shape) in tensor_shapes().items()}
    hidden, head_dim = config["hidden_size"], config["head_dim"]
    layer = {
        "self_attn.q_proj": [config["num_attention_heads"] * head_dim, hidden],
        "self_attn.k_proj": [config["num_key_value_heads"] * head_dim, hidden],
        "self_attn.v_proj": [config["num_key_value_heads"] * head_dim, hidden],
        "self_attn.o_proj": [hidden, config["num_attention_heads"] * head_dim],
        "mlp.gate_proj": [config["intermediate_size"], hidden],
        "mlp.up_proj": [config["intermediate_size"], hidden],
        "mlp.down_proj": [hidden, config["intermediate_size"]],
        "input_layernorm": [hidden],
        "post_attention_layernorm": [hidden],
    }
    expected = {"model.embed_tokens.weight": [config["vocab_size"], hidden], "model.norm.weight": [hidden]}
    for i in range(config["num_hidden_layers"]):
        expected |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    assert config["tie_word_embeddings"] is True
    assert shapes == expected


def test_special_tokens_agree_in_all_files(tokenizer: Any) -> None:
    config, generation = read("config.json"), read("generation_config.json")
    assert [tokenizer.token_to_id(token) for token in SPECIALS] == [0, 1, 2]
    assert tokenizer.get_vocab_size() == config["vocab_size"]
    assert config["eos_token_id"] == generation["eos_token_id"] == tokenizer.token_to_id("<|im_end|>")
    assert config["pad_token_id"] == generation["pad_token_id"] == tokenizer.token_to_id("<|endoftext|>")
    assert generation["do_sample"] is False
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        assert (read(name)["eos_token"], read(name)["pad_token"]) == ("<|im_end|>", "<|endoftext|>")


@pytest.mark.parametrize(
    "text",
    ["Hello, world!", "  two  spaces\n\nand lines\t", "37 + 45 = 82", "naïve 你好 🙂", '{"a": [1, 2.5]}', "\x00\x7f"],
)
def test_any_text_survives_the_tokenizer(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text


def test_digits_are_single_tokens(tokenizer: Any) -> None:
    assert [token for token in tokenizer.encode("1984 x 12").tokens if token.isdigit()] == list("198412")


def test_chat_template_renders_chatml() -> None:
    jinja2 = pytest.importorskip("jinja2")
    render = jinja2.Environment(autoescape=False).from_string(read("tokenizer_config.json")["chat_template"]).render
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "  Hi \n"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Bye"},
    ]
    text = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
    )
    assert render(messages=messages, add_generation_prompt=True) == text + "<|im_start|>assistant\n"
    assert render(messages=messages) == text


def test_training_encodes_chats_as_the_template_does(tokenizer: Any, evaluation: ModuleType) -> None:
    jinja2 = pytest.importorskip("jinja2")
    encoder = importlib.import_module("data").Encoder(tokenizer)
    render = jinja2.Environment(autoescape=False).from_string(read("tokenizer_config.json")["chat_template"]).render
    for case in evaluation.cases()[::7]:
        ids = [token for m in case.messages for token in encoder.message(m["role"], m["content"].strip())[0]]
        assert ids == tokenizer.encode(render(messages=case.messages), add_special_tokens=False).ids


def test_evaluation_asks_what_training_did_not_show(evaluation: ModuleType) -> None:
    knowledge, phrases = importlib.import_module("knowledge"), importlib.import_module("phrases")

    def plain(text: str) -> str:
        return re.sub(r"[^a-z0-9 ]", "", text.lower()).strip()

    topics = knowledge.TOKENPLANE + knowledge.GENERAL
    shown = {plain(question) for topic in topics for question in topic.questions}
    shown |= {plain(ask.format(term)) for topic in topics for term in topic.terms for ask in knowledge.DEFINE}
    shown |= {plain(ask) for asks, _ in knowledge.SMALL_TALK for ask in asks}
    shown |= {plain(ask.replace("{}", thing)) for ask in phrases.OUTSIDE[0] for thing in phrases.OUTSIDE[1]}
    shown |= {plain(ask) for asks, _ in phrases.CANNOT for ask in asks}
    asked = {plain(ask) for ask, _ in evaluation.PARAPHRASES + evaluation.SMALL_TALK} | set(
        map(plain, evaluation.OUTSIDE)
    )
    assert not asked & shown
    assert not set(evaluation.NEW_NAMES) & set(phrases.NAMES)
