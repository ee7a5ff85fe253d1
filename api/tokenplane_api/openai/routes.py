"""OpenAI's routes."""

from __future__ import annotations

import time

import msgspec
from fastapi import APIRouter, Request, Response

from .. import __version__
from ..body import read_json
from ..errors import NOT_FOUND, ApiError
from ..generation import accepted, collect
from ..headers import answer_headers, compute_type, stream_headers
from ..request_scope import record_of
from ..service import Service, begin
from ..streaming import EventStream, unless_client_leaves
from .chat_render import ChatRenderer
from .completion_render import CompletionRenderer
from .convert import Prepared, prepare_chat, prepare_completion
from .render import Head, Renderer, error_events
from .responses_convert import prepare_response
from .responses_render import ResponseRenderer
from .responses_schemas import ResponsesRequest
from .schemas import ChatRequest, CompletionRequest, SamplingFields

router = APIRouter(prefix="/v1")

_STARTED = int(time.time())

_chat_decoder = msgspec.json.Decoder(ChatRequest)
_completion_decoder = msgspec.json.Decoder(CompletionRequest)
_responses_decoder = msgspec.json.Decoder(ResponsesRequest)

_OTHER_SERVICES = ("embeddings", "rerank", "score", "classify", "moderations", "images", "audio", "batches", "files")
"""Routes of OpenAI's and others' that clients may try here."""


@router.post("/chat/completions")
async def chat_completions(request: Request) -> Response:
    service = begin(request)
    body = await read_json(request, _chat_decoder, service.settings.payload_limit_bytes)
    prepared = await prepare_chat(body, service)
    return await _answer(request, service, body, prepared, ChatRenderer, "n")


@router.post("/completions")
async def completions(request: Request) -> Response:
    service = begin(request)
    body = await read_json(request, _completion_decoder, service.settings.payload_limit_bytes)
    prepared = await prepare_completion(body, service)
    return await _answer(request, service, body, prepared, CompletionRenderer, _count_field(body))


@router.post("/responses")
async def responses(request: Request) -> Response:
    service = begin(request)
    body = await read_json(request, _responses_decoder, service.settings.payload_limit_bytes)
    prepared = await prepare_response(body, service)
    record = record_of(request)
    generations = service.generate(prepared.specs, record, "input")
    head = _head(service, record.request_id)
    renderer = ResponseRenderer(head, generations[0], prepared, service.tokenizer, body)
    kind = compute_type(service.engine.info, service.settings.compute_type)
    if body.stream:
        if prepared.specs[0].grammar is not None:
            await unless_client_leaves(request, accepted(generations))
        headers = stream_headers(kind, renderer.num_prompt_chars)
        return EventStream(renderer.stream(), renderer.error_event, record, headers)
    (output,) = await unless_client_leaves(request, collect(generations))
    num_prompt_tokens = len(generations[0].spec.prompt_ids)
    headers = answer_headers(kind, renderer.num_prompt_chars, generations, num_prompt_tokens)
    return Response(renderer.answer(output), media_type="application/json", headers=headers)


@router.get("/models")
async def models(request: Request) -> Response:
    return _json({"object": "list", "data": [_model(request.app.state.service)]})


@router.get("/models/{name:path}")
async def model(request: Request, name: str) -> Response:
    service: Service = request.app.state.service
    if name not in service.settings.accepted_names:
        raise ApiError(NOT_FOUND, f"the model `{name}` does not exist here", "model", "model_not_found")
    return _json(_model(service))


async def _not_served(request: Request) -> Response:
    raise ApiError(
        NOT_FOUND,
        f"{request.url.path} is not served: this server generates text, on /v1/chat/completions, /v1/completions and"
        " /v1/responses",
        code="unsupported_endpoint",
    )


for _name in _OTHER_SERVICES:
    for _path in (f"/{_name}", f"/{_name}/{{rest:path}}"):
        router.add_api_route(_path, _not_served, methods=["GET", "POST", "DELETE"])


async def _answer(
    request: Request,
    service: Service,
    body: SamplingFields,
    prepared: Prepared,
    renderer_type: type[Renderer],
    count_field: str,
) -> Response:
    """Run what was prepared; answer whole or as a stream. Until a stream starts, errors are ordinary HTTP errors."""
    record = record_of(request)
    generations = service.generate(prepared.specs, record, count_field)
    head = _head(service, record.request_id)
    renderer = renderer_type(head, generations, prepared, service.tokenizer)
    kind = compute_type(service.engine.info, service.settings.compute_type)
    if body.stream:
        if prepared.specs[0].grammar is not None:
            await unless_client_leaves(request, accepted(generations))
        include_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        headers = stream_headers(kind, renderer.num_prompt_chars)
        return EventStream(renderer.stream(include_usage), error_events, record, headers)
    outputs = await unless_client_leaves(request, collect(generations))
    headers = answer_headers(kind, renderer.num_prompt_chars, generations, renderer.num_prompt_tokens)
    return Response(renderer.answer(outputs), media_type="application/json", headers=headers)


def _head(service: Service, request_id: str) -> Head:
    return Head.now(request_id, service.settings.public_name, f"{__version__}-{service.engine.info.backend}")


def _count_field(body: CompletionRequest) -> str:
    """What made the sequences so many, for the error if they are too many."""
    if (body.best_of or 1) > 1:
        return "best_of"
    return "n" if (body.n or 1) > 1 else "prompt"


def _model(service: Service) -> dict[str, object]:
    name = service.settings.public_name
    found: dict[str, object] = {"id": name, "object": "model", "created": _STARTED, "owned_by": name}
    if service.limits is not None:
        found["max_model_len"] = service.limits.max_total_tokens  # vLLM's field; clients read it
    return found


def _json(value: object) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
