from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from helpers.model_folder import make_text_model
from helpers.small_tokenizers import byte_fallback_tokenizer, metaspace_tokenizer, wordpiece_tokenizer
from tokenplane_api.text.stream_decoder import StreamDecoder
from tokenplane_api.text.tokenizer import TextTokenizer

REPLACEMENT = "\ufffd"

TEXTS = [
    "Plain English, with  two spaces\nand a line break.",
    " leading and trailing ",
    "สวัสดีครับ วันนี้อากาศดีมาก",
    "नमस्ते दुनिया क्षत्रिय",
    "مرحبا بالعالم שלום עולם",
    "今天天气很好。東京は日本の首都です。대한민국",
    "👍🏽 👩‍👩‍👧‍👦 🏴󠁧󠁢󠁥󠁮󠁧󠁿 🇩🇪",
    "e\u0301 a\u030a n\u0303 \u200b|\u200d|",
    "mixed: ไทย中文🎉é and a real \ufffd sign",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 𝄞",
]


@functools.cache
def tokenizer_of(kind: str) -> TextTokenizer:
    if kind == "byte_level":
        with TemporaryDirectory() as folder:
            return TextTokenizer.load(make_text_model(Path(folder)))
    makers = {
        "byte_fallback": byte_fallback_tokenizer,
        "metaspace": metaspace_tokenizer,
        "wordpiece": wordpiece_tokenizer,
    }
    return TextTokenizer(makers[kind](), {})


KINDS = ("byte_level", "byte_fallback", "metaspace", "wordpiece")


def stream(
    tokenizer: TextTokenizer, ids: Sequence[int], skip: bool = True, prompt_ids: Sequence[int] = ()
) -> list[str]:
    decoder = StreamDecoder(tokenizer, skip, prompt_ids)
    return [*(decoder.push(id) for id in ids), decoder.flush()]


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TEXTS)
def test_streamed_text_is_the_decoded_text(kind: str, text: str, skip: bool) -> None:
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.encode(text)
    assert "".join(stream(tokenizer, ids, skip)) == tokenizer.decode(ids, skip)


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@settings(deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives_and_nothing_is_sent_that_changes_later(kind: str, text: str) -> None:
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == text
    assert pieces[-1].strip(REPLACEMENT) == "", "only a real U+FFFD at the end has to wait for the flush"


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, 520), max_size=60), skip=st.booleans())
def test_any_ids_of_a_byte_level_vocabulary_stream_as_they_decode(ids: list[int], skip: bool) -> None:
    tokenizer = tokenizer_of("byte_level")
    assert "".join(stream(tokenizer, ids, skip)) == tokenizer.decode(ids, skip)


@pytest.mark.parametrize("kind", ["metaspace", "wordpiece"])
@settings(deadline=None)
@given(ids=st.lists(st.integers(0, 420), max_size=60), skip=st.booleans())
def test_any_ids_of_a_vocabulary_without_bytes_stream_as_they_decode(kind: str, ids: list[int], skip: bool) -> None:
    tokenizer = tokenizer_of(kind)
    assert "".join(stream(tokenizer, ids, skip)) == tokenizer.decode(ids, skip)


PIECES = st.integers(259, 400).map(lambda id: [id])
CHARACTERS_IN_BYTES = st.characters(min_codepoint=0x80, exclude_categories=["Cs"]).map(
    lambda character: [3 + byte for byte in character.encode()]
)


@settings(deadline=None)
@given(parts=st.lists(st.one_of(PIECES, CHARACTERS_IN_BYTES, st.just([2])), max_size=30), skip=st.booleans())
def test_whole_characters_in_bytes_stream_as_they_decode(parts: list[list[int]], skip: bool) -> None:
    tokenizer = tokenizer_of("byte_fallback")
    ids = [id for part in parts for id in part]
    assert "".join(stream(tokenizer, ids, skip)) == tokenizer.decode(ids, skip)


@settings(deadline=None)
@given(
    strays=st.lists(st.sampled_from([0xFF, 0x80, 0xC0, 0xF5]), min_size=1, max_size=9),
    before=st.sampled_from(["", "a", "好"]),
    behind=st.text(st.sampled_from("é好😀"), min_size=1, max_size=3),
)
def test_stray_bytes_do_not_take_characters_with_them(strays: list[int], before: str, behind: str) -> None:
    tokenizer = tokenizer_of("byte_fallback")
    ids = [3 + byte for byte in [*before.encode(), *strays, *behind.encode()]]
    text = "".join(stream(tokenizer, [*ids, *tokenizer.encode("end", add_special_tokens=False)]))
    assert text.replace(REPLACEMENT, "") == before + behind + " end"
    assert REPLACEMENT in text


@settings(deadline=None)
@given(text=st.text(st.sampled_from("aé好😀 "), min_size=1, max_size=12), data=st.data())
def test_tokens_that_end_inside_characters_send_what_is_complete(text: str, data: st.DataObject) -> None:
    """Byte-level merges may cross characters: every token may end one and begin the next."""
    pieces, rest = [], text.encode()
    while rest:
        size = data.draw(st.integers(1, min(5, len(rest))))
        pieces.append(rest[:size])
        rest = rest[size:]
    vocab = {"".join(byte_letters()[byte] for byte in piece): id for id, piece in enumerate(dict.fromkeys(pieces))}
    library = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    library.decoder = decoders.ByteLevel()
    tokenizer = TextTokenizer(library, {})
    id_of = {tokenizer.token_bytes(id): id for id in vocab.values()}
    decoder, sent, num_bytes = StreamDecoder(tokenizer), "", 0
    for piece in pieces:
        sent += decoder.push(id_of[piece])
        num_bytes += len(piece)
        assert sent == text.encode()[:num_bytes].decode(errors="ignore")


@functools.cache
def byte_letters() -> dict[int, str]:
    """How byte-level vocabularies write each byte, learned from the library."""
    letters = pre_tokenizers.ByteLevel.alphabet()
    library = Tokenizer(models.BPE(vocab={letter: id for id, letter in enumerate(letters)}, merges=[]))
    library.decoder = decoders.ByteLevel()
    tokenizer = TextTokenizer(library, {})
    return {tokenizer.token_bytes(id)[0]: letter for id, letter in enumerate(letters)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TEXTS)
def test_continuing_a_prompt_gives_what_the_whole_would(kind: str, text: str) -> None:
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.encode(text, add_special_tokens=False)
    for cut in range(len(ids)):
        decoder = StreamDecoder(tokenizer)
        sent = "".join(decoder.push(id) for id in ids[:cut])
        continued = "".join(stream(tokenizer, ids[cut:], prompt_ids=ids[:cut]))
        assert sent + continued == tokenizer.decode(ids)


def test_special_tokens_of_the_prompt_do_not_hide_its_text() -> None:
    tokenizer = tokenizer_of("byte_fallback")
    first, second = (tokenizer.encode(word, add_special_tokens=False) for word in ("the", "request"))
    assert "".join(stream(tokenizer, second, prompt_ids=[1, *first, 2])) == " request"
    assert "".join(stream(tokenizer, second, prompt_ids=[1])) == "request"


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@pytest.mark.parametrize("before", ["", "好", "a 😀"])
@pytest.mark.parametrize("num_missing", [1, 2, 3])
def test_flush_marks_a_character_that_was_cut_off(kind: str, before: str, num_missing: int) -> None:
    tokenizer = tokenizer_of(kind)
    single = {tokenizer.token_bytes(id): id for id in reversed(range(tokenizer.vocab_size))}
    ids = [single[bytes([byte])] for byte in (before + "👍").encode()[:-num_missing]]
    *pieces, last = stream(tokenizer, ids)
    assert "".join(pieces) == before
    assert last
    assert set(last) == {REPLACEMENT}


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_character_that_text_interrupts_is_marked_before_the_text(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    ids_of: dict[bytes, list[int]] = {}
    for id in range(tokenizer.vocab_size):
        ids_of.setdefault(tokenizer.token_bytes(id), []).append(id)
    start = [ids_of[bytes([byte])][0] for byte in "👍".encode()[:2]]
    for text in ids_of[b"r"]:  # as a byte and, where there are both, as a piece
        assert stream(tokenizer, [*start, text]) == ["", "", REPLACEMENT + "r", ""]


def test_special_tokens_are_text_only_when_asked() -> None:
    tokenizer = tokenizer_of("byte_level")
    ids = tokenizer.encode("<|im_start|>hi<|im_end|>")
    assert "".join(stream(tokenizer, ids)) == "hi"
    assert "".join(stream(tokenizer, ids, skip=False)) == "<|im_start|>hi<|im_end|>"


class CountingTokenizer(TextTokenizer):
    longest_decode_tokens = 0

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        self.longest_decode_tokens = max(self.longest_decode_tokens, len(token_ids))
        return super().decode(token_ids, skip_special_tokens)


@pytest.mark.parametrize("make", [byte_fallback_tokenizer, metaspace_tokenizer, wordpiece_tokenizer])
@settings(max_examples=20, deadline=None)
@given(ids=st.lists(st.integers(0, 400), min_size=1, max_size=40))
def test_cost_per_token_does_not_grow(make: object, ids: list[int]) -> None:
    tokenizer = counting_tokenizer(make)
    tokenizer.longest_decode_tokens = 0
    stream(tokenizer, ids * 20, prompt_ids=ids * 20)
    assert tokenizer.longest_decode_tokens <= 2


@functools.cache
def counting_tokenizer(make: object) -> CountingTokenizer:
    assert callable(make)
    return CountingTokenizer(make(), {})
