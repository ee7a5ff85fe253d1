"""From the bytes of a request to a checked record: size limit, content type, JSON, shape.

The shape is a msgspec struct, decoded in one pass; a fault is reported with the field's path and the value found there.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec
from fastapi import Request

from .errors import MALFORMED, MEDIA_TYPE, TOO_LARGE, ApiError, ClientGone, invalid

T = TypeVar("T")

_PATH_STEP = re.compile(r"\.([^.\[\]]+)|\[(\d+)\]")
_AT = re.compile(r" - at `(.+)`$")
_KINDS = {"str": "a string", "int": "an integer", "float": "a number", "bool": "true or false", "array": "a list"}
_KINDS |= {"object": "an object", "|": "or"}
_MOST_NAME_CHARS = 100
"""Of an unknown field: looking for the known field it may mean takes time with its length."""

_KIND = re.compile(r"\b(str|int|float|bool|array|object)\b|\|")


async def read_json(request: Request, decoder: msgspec.json.Decoder[T], limit_bytes: int) -> T:
    """Read and decode the body.

    Raises:
        ApiError: wrong content type, too many bytes, malformed JSON, or not of the decoder's shape.
        ClientGone: the client left before its body was complete.
    """
    _check_content_type(request.headers.get("content-type", ""))
    return decode(await _read(request, limit_bytes), decoder)


def decode(raw: bytes | msgspec.Raw, decoder: msgspec.json.Decoder[T]) -> T:
    """Decode JSON.

    Raises:
        ApiError: malformed, or not of the decoder's shape.
    """
    try:
        return decoder.decode(raw)
    except msgspec.ValidationError as error:
        # Decoding stops at the first field of a wrong shape; what follows may not even be JSON.
        known_fields = getattr(decoder.type, "__struct_fields__", ())
        raise _shape_error(str(error), _decode_any(raw), known_fields) from None
    except (RecursionError, ValueError):
        _decode_any(raw)
        raise


def _check_content_type(header: str) -> None:
    media_type = header.partition(";")[0].strip().lower()
    is_json = media_type == "application/json"
    if not is_json and not (media_type.startswith("application/") and media_type.endswith("+json")):
        shown = f"is {media_type!r}" if media_type else "is missing"
        raise ApiError(MEDIA_TYPE, f"the content-type header {shown}; send the body as application/json")


async def _read(request: Request, limit_bytes: int) -> bytes:
    """Never holds more than the limit plus one chunk."""
    declared = request.headers.get("content-length", "")
    if declared.isascii() and declared.isdigit() and len(declared) < 20 and int(declared) > limit_bytes:
        raise _too_large(f"{int(declared)} bytes", limit_bytes)
    body = bytearray()
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        body += message.get("body", b"")
        if len(body) > limit_bytes:
            raise _too_large(f"more than {limit_bytes} bytes", limit_bytes)
        if not message.get("more_body", False):
            return bytes(body)


def _too_large(given: str, limit_bytes: int) -> ApiError:
    return ApiError(TOO_LARGE, f"the body has {given}, the limit is {limit_bytes} bytes (--payload-limit)")


def _decode_any(raw: bytes | msgspec.Raw) -> Any:
    """Whatever the JSON says, or an ApiError if it is none."""
    try:
        return msgspec.json.decode(raw)
    except msgspec.ValidationError:
        return None  # a number out of range: valid JSON that no type can hold
    except RecursionError:
        raise ApiError(MALFORMED, "the JSON body is nested too deeply", code="invalid_json") from None
    except ValueError as error:
        raise ApiError(MALFORMED, f"the body is not valid JSON: {error}", code="invalid_json") from None


def _shape_error(message: str, body: Any, known_fields: Sequence[str]) -> ApiError:
    """msgspec's sentence, with the path turned into a field name and the value added."""
    at = _AT.search(message)
    if at is None:
        unknown = re.search(r"unknown field `(.*)`", message)
        missing = re.search(r"missing required field `(.*)`", message)
        if unknown:
            name = unknown[1][:_MOST_NAME_CHARS]
            close = difflib.get_close_matches(name, known_fields, n=1)
            hint = f"did you mean `{close[0]}`?" if close else "remove it"
            return invalid(f"unknown field `{name}`; {hint}", name, "unknown_parameter")
        if missing:
            return invalid(f"`{missing[1]}` is missing", missing[1], "missing_required_parameter")
        return invalid(f"the body is not of the right type: {_plain(message)}", None, "invalid_type")
    path, sentence = at[1], _plain(message[: at.start()])
    field = path.removeprefix("$.").removeprefix("key in `$.").rstrip("`")
    return invalid(f"`{field}`: {sentence}{_value_at(path, body)}", field, "invalid_type")


def _plain(sentence: str) -> str:
    """msgspec names types as Python does; clients know JSON's names."""
    sentence = re.sub(r"`([^`]*)`", lambda kinds: _KIND.sub(lambda kind: _KINDS[kind[0]], kinds[1]), sentence)
    return sentence[:1].lower() + sentence[1:]


def _value_at(path: str, body: Any) -> str:
    value = body
    try:
        for name, index in _PATH_STEP.findall(path):
            value = value[int(index)] if index else value[name]
        shown = msgspec.json.encode(value).decode()
    except (LookupError, TypeError, RecursionError):
        return ""
    return f"; the value is {shown if len(shown) <= 60 else shown[:57] + '...'}"
