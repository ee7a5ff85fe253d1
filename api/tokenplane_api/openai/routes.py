"""OpenAI's routes."""

from __future__ import annotations

import time

import msgspec
from fastapi import APIRouter, Request, Response

from tokenplane_core.client_adapters import LoadedAdapter

from .. import __version__
from ..body import read_json
from ..errors import NOT_FOUND, TEMPLATE, ApiError
from ..generation import accepted, collect
from ..headers import answer_headers, compute_type, stream_headers
from ..operations import GENERATES, Operation
from ..request_scope import record_of
from ..service import Service, begin
from ..streaming import EventStream, unless_client_leaves
from . import answers
from .answers import ChatCompletion, ChatCompletionChunk, Completion, CompletionChunk, Model, ModelList, ResponseEvent
from .chat_render import ChatRenderer
from .completion_render import CompletionRenderer
from .convert import Prepared, adapter_of, prepare_chat, prepare_completion
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
@Operation(
    id="chat_completions",
    tag="OpenAI",
    takes=(ChatRequest,),
    answers=(ChatCompletion,),
    events=(ChatCompletionChunk,),
    errors=(*GENERATES, NOT_FOUND, TEMPLATE),
)
async def chat_completions(request: Request) -> Response:
    """Answer a conversation."""
    service = begin(request)
    body = await read_json(request, _chat_decoder, service.settings.payload_limit_bytes)
    prepared = await prepare_chat(body, service)
    return await _answer(request, service, body, prepared, ChatRenderer, "n")


@router.post("/completions")
@Operation(
    id="completions",
    tag="OpenAI",
    takes=(CompletionRequest,),
    answers=(Completion,),
    events=(CompletionChunk,),
    errors=(*GENERATES, NOT_FOUND),
)
async def completions(request: Request) -> Response:
    """Continue texts."""
    service = begin(request)
    body = await read_json(request, _completion_decoder, service.settings.payload_limit_bytes)
    prepared = await prepare_completion(body, service)
    return await _answer(request, service, body, prepared, CompletionRenderer, _count_field(body))


@router.post("/responses")
@Operation(
    id="responses",
    tag="OpenAI",
    takes=(ResponsesRequest,),
    answers=(answers.Response,),
    events=(ResponseEvent,),
    errors=(*GENERATES, NOT_FOUND, TEMPLATE),
)
async def responses(request: Request) -> Response:
    """Answer a conversation in OpenAI's newer shape. Nothing is stored: every request brings all of it."""
    service = begin(request)
    body = await read_json(request, _responses_decoder, service.settings.payload_limit_bytes)
    prepared = await prepare_response(body, service)
    record = record_of(request)
    generations = service.generate(prepared.specs, record, "input")
    head = _head(service, record.request_id, prepared.specs[0].adapter)
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
@Operation(id="openai_get_model_info", tag="OpenAI", answers=(ModelList,))
async def models(request: Request) -> Response:
    """What is served: the model, then its adapters."""
    service: Service = request.app.state.service
    adapters = [_model(service, adapter) for adapter in service.engine.adapters]
    return _json(ModelList(object="list", data=[_model(service), *adapters]))


@router.get("/models/{name:path}")
@Operation(id="openai_get_model", tag="OpenAI", answers=(Model,), errors=(NOT_FOUND,))
async def model(request: Request, name: str) -> Response:
    """One model, by any name that requests may call it."""
    service: Service = request.app.state.service
    return _json(_model(service, adapter_of(name, service)))


async def _not_served(request: Request) -> Response:
    raise ApiError(
        NOT_FOUND,
        f"{request.url.path} is not served: this server generates text, on /v1/chat/completions, /v1/completions and"
        " /v1/responses",
        code="unsupported_endpoint",
    )


for _name in _OTHER_SERVICES:
    for _path in (f"/{_name}", f"/{_name}/{{rest:path}}"):
        router.add_api_route(_path, _not_served, methods=["GET", "POST", "DELETE"], include_in_schema=False)


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
    head = _head(service, record.request_id, prepared.specs[0].adapter)
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


def _head(service: Service, request_id: str, adapter: LoadedAdapter | None) -> Head:
    name = service.settings.public_name if adapter is None else adapter.name
    return Head.now(request_id, name, f"{__version__}-{service.engine.info.backend}")


def _count_field(body: CompletionRequest) -> str:
    """What made the sequences so many, for the error if they are too many."""
    if (body.best_of or 1) > 1:
        return "best_of"
    return "n" if (body.n or 1) > 1 else "prompt"


def _model(service: Service, adapter: LoadedAdapter | None = None) -> Model:
    name = service.settings.public_name
    most = msgspec.UNSET if service.limits is None else service.limits.max_total_tokens
    found = Model(id=name, object="model", created=_STARTED, owned_by=name, max_model_len=most)
    return found if adapter is None else msgspec.structs.replace(found, id=adapter.name, parent=name)


def _json(value: object) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
