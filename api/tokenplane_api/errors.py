"""What can go wrong for a client, and how each of the two dialects says it.

One exception, `ApiError`, carries an `ErrorKind`: a row of the table below. The rest of the package raises it and does
not know which dialect is being spoken; that is decided here, by the path of the request.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import msgspec
from fastapi import Request, Response
from starlette.exceptions import HTTPException

from tokenplane_core.backend.errors import (
    EngineFailed,
    EngineNotReady,
    InvalidRequest,
    QueueFull,
    ReaderTooSlow,
    RequestError,
)

from .meaning import means
from .text.chat_template import TemplateError


@dataclass(frozen=True, slots=True)
class ErrorKind:
    """One class of error: status and name on the OpenAI routes, status and name on the native routes."""

    openai_status: int
    openai_type: str
    tgi_status: int
    tgi_type: str
    tgi_prefix: str = ""
    metric: str = "validation"  # label of tgi_request_failure, where a generation was asked for
    retry_after_s: int | None = None


VALIDATION = ErrorKind(400, "invalid_request_error", 422, "validation", "Input validation error: ")
TEMPLATE = ErrorKind(400, "invalid_request_error", 422, "template_error", "Template error: ", "template")
MALFORMED = ErrorKind(400, "invalid_request_error", 400, "bad_request")
UNAUTHORIZED = ErrorKind(401, "invalid_request_error", 401, "unauthorized")
NOT_FOUND = ErrorKind(404, "invalid_request_error", 404, "not_found")
METHOD_NOT_ALLOWED = ErrorKind(405, "invalid_request_error", 405, "method_not_allowed")
TOO_LARGE = ErrorKind(413, "invalid_request_error", 413, "payload_too_large")
MEDIA_TYPE = ErrorKind(415, "invalid_request_error", 415, "unsupported_media_type")
OVERLOADED = ErrorKind(429, "rate_limit_error", 429, "overloaded", metric="overloaded", retry_after_s=1)
TIMEOUT = ErrorKind(504, "server_error", 504, "timeout", metric="timeout")
SLOW_READER = ErrorKind(408, "invalid_request_error", 408, "slow_reader", metric="dropped")
NOT_READY = ErrorKind(503, "server_error", 503, "not_ready", metric="generation", retry_after_s=5)
UNHEALTHY = ErrorKind(503, "server_error", 503, "healthcheck", retry_after_s=5)
GENERATION = ErrorKind(503, "server_error", 424, "generation", "Request failed during generation: ", "generation")
INTERNAL = ErrorKind(500, "server_error", 500, "internal", metric="generation")

_OF_STATUS = {400: MALFORMED, 404: NOT_FOUND, 405: METHOD_NOT_ALLOWED}


class ErrorResponse(msgspec.Struct, forbid_unknown_fields=True):
    """An error, as TGI says it."""

    error: str
    error_type: Annotated[str, means("what kind: validation, overloaded, generation, not_ready, ...")]


class OpenAIError(msgspec.Struct, forbid_unknown_fields=True):
    message: Annotated[str, means("names field, value and limit")]
    type: str
    param: Annotated[str | None, means("the field at fault")]
    code: Annotated[str | None, means("a reason that programs can tell apart")]


class OpenAIErrorResponse(msgspec.Struct, forbid_unknown_fields=True):
    """An error, as OpenAI says it."""

    error: OpenAIError


# The core's words for request fields, where a dialect has another.
_OPENAI_FIELDS = {
    "token_ids": "prompt",
    "max_new_tokens": "max_tokens",
    "num_logprobs": "logprobs",
    "min_new_tokens": "min_tokens",
    "prompt_logprobs": "echo",
    "num_prompt_top_logprobs": "logprobs",
    "adapter": "model",
}
_TGI_FIELDS = {
    "token_ids": "inputs",
    "num_logprobs": "top_n_tokens",
    "prompt_logprobs": "decoder_input_details",
    "adapter": "adapter_id",
}


class ApiError(Exception):
    """Tell the client what is wrong.

    message: names field, value and limit. param: the field at fault. code: OpenAI's machine-readable reason.
    """

    def __init__(self, kind: ErrorKind, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.kind, self.message, self.param, self.code = kind, message, param, code
        self.headers: dict[str, str] = {} if kind.retry_after_s is None else {"retry-after": str(kind.retry_after_s)}


class RequestTimeout(RequestError):
    """The whole request has taken longer than the operator allows."""


class ClientGone(Exception):
    """The client closed the connection before its answer was ready."""


def invalid(message: str, param: str | None, code: str | None = "invalid_value") -> ApiError:
    """A request that breaks a rule, in the core's or the dialect's word for the field."""
    return ApiError(VALIDATION, message, param, code)


def overloaded(why: str, retry_after_s: int) -> ApiError:
    """Come back later: 429 in both dialects."""
    found = ApiError(OVERLOADED, f"Model is overloaded: {why}", code="rate_limit_exceeded")
    found.headers["retry-after"] = str(retry_after_s)
    return found


def as_api_error(error: Exception) -> ApiError:
    """Translate any exception. The core's request errors keep their sentence; an unknown error says nothing."""
    match error:
        case ApiError():
            return error
        case InvalidRequest():
            return invalid(str(error), error.field.removeprefix("sampling."))
        case TemplateError():
            return ApiError(TEMPLATE, str(error), "messages", "template_error")
        case QueueFull():
            return overloaded(str(error), error.retry_after_s)
        case RequestTimeout():
            found = ApiError(TIMEOUT, str(error), code="request_timeout")
            found.headers["x-should-retry"] = "false"  # OpenAI's clients would only wait as long again
            return found
        case ReaderTooSlow():
            return ApiError(SLOW_READER, str(error), code="slow_reader")
        case EngineNotReady():
            return ApiError(NOT_READY, str(error), code="not_ready")
        case EngineFailed():
            return ApiError(GENERATION, str(error), code="engine_failed")
        case HTTPException():
            kind = _OF_STATUS.get(error.status_code, MALFORMED if error.status_code < 500 else INTERNAL)
            found = ApiError(kind, str(error.detail))
            found.headers.update(error.headers or {})
            return found
        case _:
            return ApiError(INTERNAL, "internal error; the server's log has the details", code="internal_error")


def openai_body(error: ApiError) -> OpenAIErrorResponse:
    param = None if error.param is None else _OPENAI_FIELDS.get(error.param, error.param)
    return OpenAIErrorResponse(OpenAIError(error.message, error.kind.openai_type, param, error.code))


def tgi_body(error: ApiError) -> ErrorResponse:
    message = error.message
    field = None if error.param is None else _TGI_FIELDS.get(error.param, error.param)
    if field is not None and field not in message:
        message = f"`{field}`: {message}"
    return ErrorResponse(error.kind.tgi_prefix + message, error.kind.tgi_type)


def is_openai_path(path: str) -> bool:
    return path == "/v1" or path.startswith("/v1/")


def error_response(path: str, error: ApiError) -> Response:
    """The error as an HTTP response in the dialect of the path."""
    openai = is_openai_path(path)
    return Response(
        msgspec.json.encode(openai_body(error) if openai else tgi_body(error)),
        status_code=error.kind.openai_status if openai else error.kind.tgi_status,
        headers=error.headers,
        media_type="application/json",
    )


def describe_http_error(request: Request, error: HTTPException) -> ApiError:
    """404 and 405 of the router, with the path and a way on."""
    found = as_api_error(error)
    if found.kind is NOT_FOUND:
        found.message = f"there is no {request.method} {request.url.path}; see /v1/models and /info for what is served"
        found.code = "unknown_url"
    elif found.kind is METHOD_NOT_ALLOWED:
        found.message = f"{request.url.path} does not take {request.method}, only {error_methods(error)}"
        found.code = "method_not_allowed"
    return found


def error_methods(error: HTTPException) -> str:
    return (error.headers or {}).get("Allow", "another method")
