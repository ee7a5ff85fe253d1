from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, models

from helpers.model_folder import make_text_model
from helpers.small_tokenizers import byte_fallback_tokenizer
from tokenplane_api.text.tokenizer import TextTokenizer
from tokenplane_core.backend.errors import ConfigError, InvalidRequest

TEXT = "Hé 👍🏽 สวัสดี <|im_end|> 你好"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> TextTokenizer:
    return TextTokenizer.load(folder)


def change_json(file: Path, **changes: object) -> None:
    value = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({name: entry for name, entry in value.items() if entry is not None}))


def test_encode_and_decode_are_inverse(tokenizer: TextTokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode(TEXT), skip_special_tokens=False) == TEXT
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT.replace("<|im_end|>", "")


def test_facts_come_from_the_configs(tokenizer: TextTokenizer) -> None:
    assert tokenizer.vocab_size == 512
    assert tokenizer.bos_token is None
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.max_length_tokens == 2048
    assert tokenizer.is_special(2)
    assert not tokenizer.is_special(tokenizer.encode("a")[0])


def test_stop_ids_unite_the_models_and_the_tokenizers(tmp_path: Path) -> None:
    make_text_model(tmp_path)
    change_json(tmp_path / "generation_config.json", eos_token_id=7)
    assert TextTokenizer.load(tmp_path).stop_token_ids == [2, 7]
    change_json(tmp_path / "generation_config.json", eos_token_id=[0, 9])
    assert TextTokenizer.load(tmp_path).stop_token_ids == [0, 2, 9]


def test_stop_ids_fall_back_to_the_model_config(tmp_path: Path) -> None:
    make_text_model(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    change_json(tmp_path / "config.json", eos_token_id=5)
    assert TextTokenizer.load(tmp_path).stop_token_ids == [2, 5]


def test_huge_max_length_means_none(tmp_path: Path) -> None:
    make_text_model(tmp_path)
    change_json(tmp_path / "tokenizer_config.json", model_max_length=1e30)
    assert TextTokenizer.load(tmp_path).max_length_tokens is None


def test_another_tokenizer_config_wins_where_it_says_something(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"eos_token": {"content": "<|endoftext|>"}, "bos_token": "<|im_start|>"}))
    tokenizer = TextTokenizer.load(folder, other)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|endoftext|>")
    assert tokenizer.max_length_tokens == 2048
    other.write_text(json.dumps({"chat_template": "only this"}))
    assert TextTokenizer.load(folder, other).eos_token == "<|im_end|>"


def test_tokens_that_the_config_names_are_special_and_keep_their_id(tmp_path: Path) -> None:
    make_text_model(tmp_path)
    plain = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    plain.add_tokens([AddedToken("<|turn|>", rstrip=True), "<|note|>"])
    plain.save(str(tmp_path / "tokenizer.json"))
    config = {"eos_token": "<|turn|>", "pad_token": "<|missing|>", "additional_special_tokens": ["<|im_start|>"]}
    change_json(tmp_path / "tokenizer_config.json", **config)
    tokenizer = TextTokenizer.load(tmp_path)
    turn, note = (plain.get_vocab()[content] for content in ("<|turn|>", "<|note|>"))
    assert tokenizer.is_special(turn)
    assert not tokenizer.is_special(note)
    assert tokenizer.vocab_size == plain.get_vocab_size(), "a name that the vocabulary lacks gets no id"
    assert tokenizer.encode("a<|turn|>  b") == plain.encode("a<|turn|>  b").ids, "and what it strips stays"
    assert tokenizer.decode([turn, note]) == "<|note|>"


def test_truncation_of_the_training_run_is_dropped(tmp_path: Path) -> None:
    make_text_model(tmp_path)
    cut = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    cut.enable_truncation(4)
    cut.enable_padding(length=64)
    cut.save(str(tmp_path / "tokenizer.json"))
    text = "one two three four five six seven"
    tokenizer = TextTokenizer.load(tmp_path)
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


def test_offsets_count_utf8_bytes(tokenizer: TextTokenizer) -> None:
    data = TEXT.encode()
    tokens = tokenizer.encode_offsets(TEXT)
    assert [id for id, *_ in tokens] == tokenizer.encode(TEXT)
    assert all(data[start:stop].decode() == text for _, text, start, stop in tokens)
    assert tokens[0][2] == 0
    assert tokens[-1][3] == len(data)


def test_offsets_of_added_tokens_are_empty() -> None:
    tokenizer = TextTokenizer(byte_fallback_tokenizer(), {"bos_token": "<s>"})
    assert tokenizer.encode_offsets("hi")[0] == (1, "", 0, 0)
    assert tokenizer.encode_offsets("hi", add_special_tokens=False)[0][0] != 1


def test_tokens_of_a_text_have_its_bytes(tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == TEXT
    assert tokenizer.token_bytes(10**6) == b""


def test_tokens_of_a_byte_fallback_text_have_its_bytes() -> None:
    tokenizer = TextTokenizer(byte_fallback_tokenizer(), {})
    assert not tokenizer.is_byte_level
    ids = tokenizer.encode("the สวัสดี 👍", add_special_tokens=False)
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == " the สวัสดี 👍"


def test_token_text_keeps_the_leading_space() -> None:
    tokenizer = TextTokenizer(byte_fallback_tokenizer(), {})
    ids = tokenizer.encode("the request", add_special_tokens=False)
    assert "".join(map(tokenizer.token_text, ids)) == " the request"
    assert tokenizer.token_text(1) == "<s>"


def test_every_token_text_matches_the_library(tokenizer: TextTokenizer) -> None:
    for id in range(tokenizer.vocab_size):
        assert tokenizer.token_text(id) == tokenizer.decode([id], skip_special_tokens=False)
        assert tokenizer.token_bytes(id).decode(errors="replace") == tokenizer.token_text(id)


def test_lone_surrogate_is_refused_by_position(tokenizer: TextTokenizer) -> None:
    with pytest.raises(InvalidRequest, match=r"character 2 is the lone surrogate U\+D83D") as caught:
        tokenizer.encode("ab\ud83d")
    assert caught.value.field == "text"
    with pytest.raises(InvalidRequest):
        tokenizer.encode_offsets("\udc00")


def test_missing_tokenizer_file_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"no tokenizer\.json \(only tokenizer\.model\).*save_pretrained"):
        TextTokenizer.load(tmp_path)
    with pytest.raises(ConfigError, match="is not a folder"):
        TextTokenizer.load(tmp_path / "nowhere")


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    make_text_model(tmp_path)
    with pytest.raises(ConfigError, match=r"--tokenizer-config-path is .*missing\.json, which is not a file"):
        TextTokenizer.load(tmp_path, tmp_path / "missing.json")
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json is not a JSON object"):
        TextTokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer\.json cannot be read"):
        TextTokenizer.load(tmp_path)


def test_tokenizer_without_decoder_loads() -> None:
    tokenizer = TextTokenizer(Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")), {})
    assert tokenizer.decode([0, 1]) == "a b"
    assert [tokenizer.token_text(id) for id in (0, 1)] == [" a", " b"]
