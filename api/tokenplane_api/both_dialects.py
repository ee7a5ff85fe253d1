"""Routes in which both dialects meet: SageMaker's /invocations, Vertex AI's predictions, and TGI's /chat_tokenize.

The first two wrap other routes; what they take and answer inside is said there.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import msgspec
from fastapi import APIRouter, Request, Response
from starlette.types import Message

from tokenplane_core.backend.errors import ConfigError

from .body import decode, read_json
from .errors import NOT_FOUND, TEMPLATE, ApiError, OpenAIErrorResponse, invalid
from .generation import GenerationSpec, Output, collect
from .health import health
from .openai.answers import ChatCompletion, ChatCompletionChunk, Completion, CompletionChunk
from .openai.chat_prompt import num_characters, render_chat
from .openai.convert import prepare_chat
from .openai.routes import chat_completions, completions
from .openai.schemas import ChatRequest, CompletionRequest
from .openai.tools import tool_use
from .operations import GENERATES, READS, Operation
from .request_scope import record_of
from .service import Service, begin
from .settings import Settings
from .streaming import unless_client_leaves
from .tgi.convert import generate_specs
from .tgi.render import pick_best, text_of
from .tgi.routes import compat_generate, simple_tokens
from .tgi.schemas import (
    ChatTokenizeResponse,
    CompatGenerateRequest,
    GenerateRequest,
    GenerateResponse,
    StreamResponse,
    VertexRequest,
    VertexResponse,
)

router = APIRouter()

_fields_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])
_vertex_decoder = msgspec.json.Decoder(VertexRequest)
_generate_decoder = msgspec.json.Decoder(GenerateRequest)
_chat_decoder = msgspec.json.Decoder(ChatRequest)

_ROUTES: dict[str, Callable[[Request], Awaitable[Response]]] = {
    "inputs": compat_generate,
    "messages": chat_completions,
    "prompt": completions,
}
"""Of /invocations, by the field that only they have, in TGI's order."""


@router.post("/invocations")
@Operation(
    id="sagemaker_compatibility",
    tag="Platforms",
    takes=(CompatGenerateRequest, ChatRequest, CompletionRequest),
    answers=(list[GenerateResponse], ChatCompletion, Completion),
    events=(StreamResponse, ChatCompletionChunk, CompletionChunk, OpenAIErrorResponse),
    errors=(*GENERATES, NOT_FOUND, TEMPLATE),
)
async def invocations(request: Request) -> Response:
    """SageMaker's route: `/`, `/v1/chat/completions` or `/v1/completions`, by what the body holds.

    Errors have TGI's body.
    """
    service = begin(request)
    fields = await read_json(request, _fields_decoder, service.settings.payload_limit_bytes)
    for name, route in _ROUTES.items():
        if name in fields:
            return await route(_with_body(request, msgspec.json.encode(fields)))
    raise invalid(
        "the body has none of `inputs` (as for /generate), `messages` (as for /v1/chat/completions) and `prompt`"
        " (as for /v1/completions); add one",
        None,
    )


def _with_body(request: Request, raw: bytes) -> Request:
    """The request with a body that is still to be read; then it goes on as before, and tells when the client leaves."""
    messages: list[Message] = [{"type": "http.request", "body": raw, "more_body": False}]

    async def receive() -> Message:
        return messages.pop() if messages else await request.receive()

    return Request(request.scope, receive)


@router.post("/chat_tokenize")
@Operation(
    id="get_chat_tokenize", tag="TGI", takes=(ChatRequest,), answers=(ChatTokenizeResponse,), errors=(*READS, TEMPLATE)
)
async def chat_tokenize(request: Request) -> Response:
    """Show what a conversation becomes. The templated text, and its tokens as in /tokenize."""
    service: Service = request.app.state.service
    body = await read_json(request, _chat_decoder, service.settings.payload_limit_bytes)
    tools = tool_use(body)
    text = await service.in_worker(num_characters(body), lambda: render_chat(body, tools, service))
    tokens = await service.in_worker(len(text), lambda: simple_tokens(text, service, add_special_tokens=False))
    answer = ChatTokenizeResponse(tokenize_response=tokens, templated_text=text)
    return Response(msgspec.json.encode(answer), media_type="application/json")


@dataclass(frozen=True, slots=True)
class _Instance:
    """specs: its candidates, of which the best is the prediction."""

    specs: list[GenerationSpec]
    full_text: bool = False


@router.post("/vertex")
@Operation(
    id="vertex",
    tag="Platforms",
    takes=(VertexRequest,),
    answers=(VertexResponse,),
    errors=(*GENERATES, NOT_FOUND, TEMPLATE),
)
async def vertex(request: Request) -> Response:
    """Vertex AI's predictions, in the order of the instances. All instances run at once.

    An instance is a body of /generate or of /v1/chat/completions; its parameters mean what they mean there, but it
    is never streamed.
    """
    service = begin(request)
    body = await read_json(request, _vertex_decoder, service.settings.payload_limit_bytes)
    if not body.instances:
        raise invalid("`instances` is empty; at least one is needed", "instances")
    instances = [await _instance(raw, i, service) for i, raw in enumerate(body.instances)]
    specs = [spec for instance in instances for spec in instance.specs]
    generations = service.generate(specs, record_of(request), "instances")
    outputs = await unless_client_leaves(request, collect(generations))
    return Response(
        msgspec.json.encode(VertexResponse(predictions=_predictions(instances, outputs))), media_type="application/json"
    )


def vertex_router(settings: Settings) -> APIRouter:
    """The paths that Vertex AI wants for predictions and for health, if it said any."""
    named = APIRouter()
    for flag, path in (
        ("AIP_PREDICT_ROUTE", settings.vertex_predict_route),
        ("AIP_HEALTH_ROUTE", settings.vertex_health_route),
    ):
        if path is not None and not path.startswith("/"):
            raise ConfigError(f"{flag} is {path!r}; a path begins with /")
    if settings.vertex_predict_route is not None:
        named.add_api_route(settings.vertex_predict_route, vertex, methods=["POST"])
    if settings.vertex_health_route is not None:
        named.add_api_route(settings.vertex_health_route, health, methods=["GET", "HEAD"])
    return named


async def _instance(raw: msgspec.Raw, index: int, service: Service) -> _Instance:
    field = f"instances[{index}]"
    try:
        if "messages" in decode(raw, _fields_decoder):
            prepared = await prepare_chat(decode(raw, _chat_decoder), service)
            return _Instance(prepared.specs[:1])
        body = decode(raw, _generate_decoder)
        return _Instance(await generate_specs(body, service, streaming=False), bool(body.parameters.return_full_text))
    except ApiError as error:
        error.message = f"`{field}`: {error.message}"
        raise


def _predictions(instances: Sequence[_Instance], outputs: Sequence[Output]) -> list[str]:
    predictions: list[str] = []
    start = 0
    for instance in instances:
        end = start + len(instance.specs)
        predictions.append(text_of(pick_best(outputs[start:end])[0], instance.full_text))
        start = end
    return predictions
