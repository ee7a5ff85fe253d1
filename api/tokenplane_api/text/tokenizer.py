"""The model's tokenizer, read from its folder. Knows nothing about chat, streams or requests."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, pre_tokenizers

from tokenplane_core.backend.errors import ConfigError, InvalidRequest

_NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")

# transformers writes 1e30 where a tokenizer knows no limit.
_NO_MAX_LENGTH = 1_000_000_000


class TextTokenizer:
    """Text to token ids and back, special tokens included.

    Safe to use from several threads: nothing changes after `load`.
    """

    def __init__(self, tokenizer: Tokenizer, config: dict[str, Any], end_token_ids: Sequence[int] = ()) -> None:
        """config: the parsed tokenizer_config.json; end_token_ids: where the model's own settings say it ends."""
        # Cutting or padding a prompt is for the server to decide, not for a leftover of the training run.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        _mark_named_tokens(tokenizer, config)
        self._tokenizer = tokenizer
        self._special_ids = frozenset(id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special)
        self.vocab_size = max(tokenizer.get_vocab().values(), default=-1) + 1
        """One more than the highest token id. The model's logits may be wider: padding ids decode to nothing."""
        self.bos_token = _token_content(config.get("bos_token"))
        self.eos_token = _token_content(config.get("eos_token"))
        eos_id = tokenizer.token_to_id(self.eos_token) if self.eos_token else None
        self.stop_token_ids = sorted({*end_token_ids, *([] if eos_id is None else [eos_id])})
        """Ids that end a generation unless the request ignores them."""
        self.max_length_tokens = _max_length_tokens(config)
        """The longest sequence the tokenizer's authors expected; None if they did not say."""
        decoder_types = _decoder_types(tokenizer)
        self.is_byte_level = "ByteLevel" in decoder_types
        """Whether the text of a sequence is its tokens' `token_bytes`, joined and read as UTF-8."""
        self.byte_tokens = _byte_tokens(tokenizer) if "ByteFallback" in decoder_types else {}
        """The tokens that stand for one raw byte, in vocabularies that fall back to bytes."""
        self._byte_of = _byte_alphabet()
        self._token_texts: dict[int, str] = {}  # of the tokens that were asked for
        self._token_bytes: dict[int, bytes] = {}
        # Decoders strip the space in front of the first token; behind this ordinary token they keep it.
        anchor = tokenizer.encode("a", add_special_tokens=False).ids[-1:]
        self._anchor, self._anchor_text = anchor, tokenizer.decode(anchor, skip_special_tokens=False)

    @classmethod
    def load(cls, folder: Path, tokenizer_config_path: Path | None = None) -> TextTokenizer:
        """Read tokenizer.json, tokenizer_config.json and generation_config.json (else config.json) of a model folder.

        tokenizer_config_path: a file whose entries win over those of the folder's tokenizer_config.json.

        Raises:
            ConfigError: tokenizer.json is missing or cannot be read, or a config file is no JSON object.
        """
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise ConfigError(_no_tokenizer_message(folder))
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            raise ConfigError(f"{file} cannot be read by the tokenizers library: {error}") from error
        config = {**read_json_object(folder / "tokenizer_config.json"), **read_config_option(tokenizer_config_path)}
        return cls(tokenizer, config, _end_token_ids(folder))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Raises InvalidRequest if `text` holds a lone surrogate, which no tokenizer can encode."""
        return list(self._encode(self._tokenizer.encode_batch_fast, text, add_special_tokens).ids)

    def encode_offsets(self, text: str, add_special_tokens: bool = True) -> list[tuple[int, str, int, int]]:
        """Encode and say where each token comes from: (id, slice of the text, start, stop).

        Offsets are positions in the UTF-8 bytes of `text`, as in TGI's /tokenize. Each token of a character that is
        split over several has the whole character; a token that is not in the text (a BOS) has "" and 0, 0.

        Raises:
            InvalidRequest: as `encode`.
        """
        encoding = self._encode(self._tokenizer.encode_batch, text, add_special_tokens)
        starts = [0, *itertools.accumulate(len(character.encode()) for character in text)]
        return [
            (id, text[start:stop], starts[start], starts[stop])
            for id, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True)
        ]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Decode all at once; ids outside the vocabulary give nothing, bytes that are no UTF-8 give U+FFFD."""
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens))

    def token_text(self, token_id: int) -> str:
        """The text of the one token, with its leading space; U+FFFD for each part of a character that it cuts."""
        known = self._token_texts.get(token_id)
        if known is None:
            known = self._token_texts[token_id] = self._find_text(token_id)
        return known

    def _find_text(self, token_id: int) -> str:
        text = self.decode([*self._anchor, token_id], skip_special_tokens=False)
        if text.startswith(self._anchor_text):
            return text[len(self._anchor_text) :]
        return self.decode([token_id], skip_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of the one token: where tokens cut characters, joining these loses nothing."""
        known = self._token_bytes.get(token_id)
        if known is None:
            known = self._token_bytes[token_id] = self._find_bytes(token_id)
        return known

    def _find_bytes(self, token_id: int) -> bytes:
        if token_id in self.byte_tokens:
            return self.byte_tokens[token_id]
        if not self.is_byte_level:
            return self.token_text(token_id).encode()
        piece = self.piece(token_id) or ""
        codes = [code for character in piece if (code := self._byte_of.get(character)) is not None]
        # As the library: a piece with any character outside the byte alphabet is literal text.
        return bytes(codes) if len(codes) == len(piece) else piece.encode()

    def piece(self, token_id: int) -> str | None:
        """How the vocabulary writes the token; None if it has no such id."""
        piece: str | None = self._tokenizer.id_to_token(token_id)
        return piece

    def token_id(self, piece: str) -> int | None:
        """The id of the one token that is written so; None if the vocabulary has none."""
        token_id: int | None = self._tokenizer.token_to_id(piece)
        return token_id

    def is_special(self, token_id: int) -> bool:
        """Whether `decode` skips it."""
        return token_id in self._special_ids

    def _encode(self, encode_batch: Callable[..., list[Any]], text: str, add_special_tokens: bool) -> Any:
        """Encode as a batch of one: for a batch the library lets other threads run, for a single text it does not."""
        try:
            return encode_batch([text], add_special_tokens=add_special_tokens)[0]
        except TypeError:
            at = next((i for i, character in enumerate(text) if "\ud800" <= character <= "\udfff"), None)
            if at is None:
                raise
            raise InvalidRequest(
                f"text is not valid Unicode: character {at} is the lone surrogate U+{ord(text[at]):04X};"
                " send characters beyond U+FFFF as a whole",
                field="text",
            ) from None


def read_config_option(path: Path | None) -> dict[str, Any]:
    """The file that --tokenizer-config-path names; {} without one. Raises ConfigError if it is no JSON object."""
    if path is None:
        return {}
    if not path.is_file():
        raise ConfigError(f"--tokenizer-config-path is {path}, which is not a file")
    return read_json_object(path)


def read_json_object(file: Path) -> dict[str, Any]:
    """{} if there is no such file. Raises ConfigError if it is there and no JSON object."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{file} is not a JSON object")
    return value


def _no_tokenizer_message(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder} is not a folder: no tokenizer to load"
    older = [
        name for name in ("tokenizer.model", "vocab.json", "vocab.txt", "tiktoken.model") if (folder / name).exists()
    ]
    found = f"only {', '.join(older)}" if older else "no other tokenizer file"
    return (
        f"{folder} has no tokenizer.json ({found}). Write one with transformers:"
        f" AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
    )


def _end_token_ids(folder: Path) -> list[int]:
    """eos_token_id, an id or a list, of generation_config.json; of config.json where that says nothing."""
    generation = read_json_object(folder / "generation_config.json").get("eos_token_id")
    if generation is None:
        config = read_json_object(folder / "config.json")
        generation = config.get("eos_token_id") or (config.get("text_config") or {}).get("eos_token_id")
    ids = generation if isinstance(generation, list) else [generation]
    return [id for id in ids if isinstance(id, int)]


def _max_length_tokens(config: dict[str, Any]) -> int | None:
    value = config.get("model_max_length")
    return int(value) if isinstance(value, int | float) and 0 < value < _NO_MAX_LENGTH else None


def _token_content(value: Any) -> str | None:
    """A token of tokenizer_config.json: its text, or an object with the text as `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _mark_named_tokens(tokenizer: Tokenizer, config: dict[str, Any]) -> None:
    """Make every token that the config names special, as transformers does: some tokenizer.json forget to."""
    added = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    for content in _named_tokens(config):
        token = added.get(content) or AddedToken(content, normalized=False)
        if not token.special and tokenizer.token_to_id(content) is not None:
            tokenizer.add_special_tokens([token])


def _named_tokens(config: dict[str, Any]) -> Iterator[str]:
    extra = config.get("additional_special_tokens")
    values = [*(config.get(name) for name in _NAMED_TOKENS), *(extra if isinstance(extra, list) else [])]
    return (content for value in values if (content := _token_content(value)))


def _decoder_types(tokenizer: Tokenizer) -> set[str]:
    if tokenizer.decoder is None:
        return set()
    decoder = json.loads(tokenizer.decoder.__getstate__())
    return {part["type"] for part in decoder.get("decoders", [decoder])}


def _byte_tokens(tokenizer: Tokenizer) -> dict[int, bytes]:
    ids = ((tokenizer.token_to_id(f"<0x{byte:02X}>"), byte) for byte in range(256))
    return {id: bytes([byte]) for id, byte in ids if id is not None}


def _byte_alphabet() -> dict[str, int]:
    """Which byte each character of a byte-level vocabulary stands for.

    Printable Latin-1 characters stand for themselves, the others are numbered from U+0100 on in byte order.

    Source: GPT-2 (Radford et al., 2019).
    """
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    shifted = (byte for byte in range(256) if chr(byte) not in alphabet)
    return {character: ord(character) if ord(character) < 256 else next(shifted) for character in sorted(alphabet)}
