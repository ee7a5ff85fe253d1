"""OpenAI's routes."""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec
from fastapi import APIRouter, Request, Response

from .. import __version__
from ..body import read_json
from ..errors import NOT_FOUND, ApiError
from ..generation import GenerationSpec, collect
from ..headers import answer_headers, compute_type, stream_headers
from ..request_scope import record_of
from ..service import Service, begin
from ..streaming import EventStream, unless_client_leaves
from .convert import chat_specs, completion_specs
from .render import ChatRenderer, CompletionRenderer, Head, Renderer, error_events
from .schemas import ChatRequest, CompletionRequest, SamplingFields

router = APIRouter(prefix="/v1")

_STARTED = int(time.time())

_chat_decoder = msgspec.json.Decoder(ChatRequest)
_completion_decoder = msgspec.json.Decoder(CompletionRequest)


@router.post("/chat/completions")
async def chat_completions(request: Request) -> Response:
    service = begin(request)
    body = await read_json(request, _chat_decoder, service.settings.payload_limit_bytes)
    specs = await chat_specs(body, service)
    return await _answer(request, service, body, specs, ChatRenderer, "n")


@router.post("/completions")
async def completions(request: Request) -> Response:
    service = begin(request)
    body = await read_json(request, _completion_decoder, service.settings.payload_limit_bytes)
    specs = await completion_specs(body, service)
    return await _answer(request, service, body, specs, CompletionRenderer, "n" if (body.n or 1) > 1 else "prompt")


@router.get("/models")
async def models(request: Request) -> Response:
    return _json({"object": "list", "data": [_model(request.app.state.service)]})


@router.get("/models/{name:path}")
async def model(request: Request, name: str) -> Response:
    service: Service = request.app.state.service
    if name not in service.settings.accepted_names:
        raise ApiError(NOT_FOUND, f"the model `{name}` does not exist here", "model", "model_not_found")
    return _json(_model(service))


async def _answer(
    request: Request,
    service: Service,
    body: SamplingFields,
    specs: Sequence[GenerationSpec],
    renderer_type: type[Renderer],
    count_field: str,
) -> Response:
    """Run the specs and answer whole or as a stream. Until the stream starts, errors are ordinary HTTP errors."""
    record = record_of(request)
    generations = service.generate(specs, record, count_field)
    info = service.engine.info
    head = Head.now(record.request_id, service.settings.public_name, f"{__version__}-{info.backend}")
    renderer = renderer_type(head, generations, body.n or 1, service.tokenizer)
    kind = compute_type(info, service.settings.compute_type)
    if body.stream:
        include_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        headers = stream_headers(kind, renderer.num_prompt_chars)
        return EventStream(renderer.stream(include_usage), error_events, record, headers)
    outputs = await unless_client_leaves(request, collect(generations))
    headers = answer_headers(kind, renderer.num_prompt_chars, generations, renderer.num_prompt_tokens)
    return Response(renderer.answer(outputs), media_type="application/json", headers=headers)


def _model(service: Service) -> dict[str, object]:
    name = service.settings.public_name
    found: dict[str, object] = {"id": name, "object": "model", "created": _STARTED, "owned_by": name}
    if service.limits is not None:
        found["max_model_len"] = service.limits.max_total_tokens  # vLLM's field; clients read it
    return found


def _json(value: object) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
