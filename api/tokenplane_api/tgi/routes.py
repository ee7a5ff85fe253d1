"""TGI's native routes."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import msgspec
from fastapi import APIRouter, Request, Response

from .. import __version__
from ..body import read_json
from ..errors import NOT_READY
from ..generation import collect
from ..headers import answer_headers, compute_type, stream_headers
from ..operations import GENERATES, READS, Operation
from ..request_scope import RequestRecord, record_of
from ..service import Service, begin
from ..streaming import EventStream, unless_client_leaves
from .convert import generate_specs, wants_details
from .render import error_event, generate_response, pick_best, stream_events
from .schemas import CompatGenerateRequest, GenerateRequest, GenerateResponse, Info, SimpleToken, StreamResponse

router = APIRouter()

_decoder = msgspec.json.Decoder(GenerateRequest)
_compat_decoder = msgspec.json.Decoder(CompatGenerateRequest)


@router.post("/")
@Operation(
    id="compat_generate",
    tag="TGI",
    takes=(CompatGenerateRequest,),
    answers=(list[GenerateResponse],),
    events=(StreamResponse,),
    errors=GENERATES,
)
async def compat_generate(request: Request) -> Response:
    """Generate text: a list of one answer, or a stream. The prompt is in front unless return_full_text says no."""
    service = begin(request)
    body = await read_json(request, _compat_decoder, service.settings.payload_limit_bytes)
    if body.stream:
        return _stream(request, service, body, full_text_default=True)
    return await _generate(request, service, body, full_text_default=True, as_list=True)


@router.post("/generate")
@Operation(id="generate", tag="TGI", takes=(GenerateRequest,), answers=(GenerateResponse,), errors=GENERATES)
async def generate(request: Request) -> Response:
    """Generate text."""
    service = begin(request)
    body = await read_json(request, _decoder, service.settings.payload_limit_bytes)
    return await _generate(request, service, body, full_text_default=False, as_list=False)


@router.post("/generate_stream")
@Operation(
    id="generate_stream",
    tag="TGI",
    takes=(GenerateRequest,),
    events=(StreamResponse,),
    errors=(*READS, NOT_READY),
)
async def generate_stream(request: Request) -> Response:
    """Generate text as a stream. What is wrong with parameters comes as an event, too."""
    service = begin(request)
    body = await read_json(request, _decoder, service.settings.payload_limit_bytes)
    return _stream(request, service, body, full_text_default=False)


@router.post("/tokenize")
@Operation(id="tokenize", tag="TGI", takes=(GenerateRequest,), answers=(list[SimpleToken],), errors=READS)
async def tokenize(request: Request) -> Response:
    """Split a text into tokens. Special tokens are included, and `parameters` do not apply."""
    service: Service = request.app.state.service
    body = await read_json(request, _decoder, service.settings.payload_limit_bytes)
    text = body.inputs
    return _json(await service.in_worker(len(text), lambda: simple_tokens(text, service)))


@router.get("/info")
@Operation(id="get_model_info", tag="TGI", answers=(Info,), errors=(NOT_READY,))
async def info(request: Request) -> Response:
    """Model, limits and device."""
    service: Service = request.app.state.service
    settings, limits = service.settings, service.require_ready()
    engine = service.engine.info
    return _json(
        Info(
            model_id=settings.model_id,
            model_sha=settings.model_sha,
            model_pipeline_tag=None,
            max_concurrent_requests=settings.max_concurrent_requests,
            max_best_of=settings.max_best_of,
            max_stop_sequences=settings.max_stop_sequences,
            max_input_tokens=limits.max_input_tokens,
            max_total_tokens=limits.max_total_tokens,
            validation_workers=settings.validation_workers,
            max_client_batch_size=settings.max_client_batch_size,
            router="text-generation-router",
            version=__version__,
            sha=None,
            docker_label=None,
            model_dtype=engine.dtype,
            model_device_type=engine.device_kind,
            device=engine.device,
            backend=engine.backend,
            backend_version=engine.backend_version,
            kernels=engine.kernels,
            max_batch_prefill_tokens=engine.max_step_tokens,
            max_batch_total_tokens=engine.num_blocks * engine.block_tokens,
            max_batch_size=engine.max_sequences,
            memory=engine.memory,
        )
    )


def simple_tokens(text: str, service: Service, add_special_tokens: bool = True) -> list[SimpleToken]:
    tokens = service.tokenizer.encode_offsets(text, add_special_tokens)
    return [SimpleToken(*token) for token in tokens]


async def _generate(
    request: Request, service: Service, body: GenerateRequest, full_text_default: bool, as_list: bool
) -> Response:
    specs = await generate_specs(body, service, streaming=False)
    generations = service.generate(specs, record_of(request), "best_of")
    outputs = pick_best(await unless_client_leaves(request, collect(generations)))
    best = outputs[0].generation
    full_text = _full_text(body, full_text_default)
    answer = generate_response(outputs, service.tokenizer, full_text, wants_details(body.parameters))
    kind = compute_type(service.engine.info, service.settings.compute_type)
    headers = answer_headers(kind, len(body.inputs), [best], len(best.spec.prompt_ids))
    return _json([answer] if as_list else answer, headers)


def _stream(request: Request, service: Service, body: GenerateRequest, full_text_default: bool) -> Response:
    record = record_of(request)
    events = _events(service, body, record, _full_text(body, full_text_default))
    kind = compute_type(service.engine.info, service.settings.compute_type)
    return EventStream(events, error_event, record, stream_headers(kind, len(body.inputs)))


async def _events(
    service: Service, body: GenerateRequest, record: RequestRecord, full_text: bool
) -> AsyncGenerator[bytes, None]:
    """Validation happens inside the stream: on these routes its errors are events, too."""
    specs = await generate_specs(body, service, streaming=True)
    (generation,) = service.generate(specs, record, "best_of")
    async for data in stream_events(generation, service.tokenizer, full_text, wants_details(body.parameters)):
        yield data


def _full_text(body: GenerateRequest, default: bool) -> bool:
    asked = body.parameters.return_full_text
    return default if asked is None else asked


def _json(value: GenerateResponse | list[GenerateResponse] | object, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json", headers=headers)
