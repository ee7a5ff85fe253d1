"""KServe's inference protocol, version 2, in the form that TGI speaks: tensors of bytes that are UTF-8 text.

Names and versions of models in paths are echoed, not checked: there is one model.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from fastapi import APIRouter, Request, Response

from .. import __version__
from ..body import read_json
from ..errors import NOT_READY, ApiError, invalid
from ..generation import GenerationSpec, collect
from ..meaning import means
from ..operations import GENERATES, Operation
from ..request_scope import record_of
from ..service import begin
from ..streaming import unless_client_leaves
from .convert import generate_specs
from .render import pick_best, text_of
from .schemas import GenerateRequest, Parameters

router = APIRouter(prefix="/v2")


class InferInput(msgspec.Struct, frozen=True):
    name: Annotated[str, means("not read")]
    shape: Annotated[list[int], means("not read: `data` says how long it is")]
    datatype: Annotated[str, means("not read: always text")]
    data: Annotated[list[int], means("bytes of UTF-8 text")]


class AskedOutput(msgspec.Struct, frozen=True):
    name: Annotated[str, means("what the output shall be called")]


class InferRequest(msgspec.Struct, frozen=True):
    id: Annotated[str, means("given back in the answer")]
    inputs: Annotated[list[InferInput], means("prompts")]
    outputs: Annotated[list[AskedOutput], means("one for each input")]
    parameters: Annotated[Parameters, means("for all inputs; absent: sampled, null is refused")] = Parameters(
        do_sample=True
    )


class InferOutput(msgspec.Struct, frozen=True):
    name: str
    shape: Annotated[list[int], means("1 and the number of bytes")]
    datatype: Literal["BYTES"]
    data: Annotated[list[int], means("bytes of UTF-8 text")]


class InferResponse(msgspec.Struct, frozen=True):
    id: str
    outputs: list[InferOutput]


class ServerMetadata(msgspec.Struct, frozen=True):
    name: str
    version: str
    extensions: list[str]


class Live(msgspec.Struct, frozen=True):
    live: bool


_decoder = msgspec.json.Decoder(InferRequest)


@router.get("")
@Operation(id="kserve_server", tag="KServe", answers=(ServerMetadata,))
async def server() -> Response:
    """What the server is, and speaks."""
    return _json(ServerMetadata("text-generation-inference", __version__, ["health", "models", "metrics"]))


@router.get("/health/live")
@Operation(id="kserve_live", tag="KServe", answers=(Live,))
async def live() -> Response:
    """The process answers."""
    return _json(Live(True))


@router.get("/health/ready")
@Operation(id="kserve_ready", tag="KServe", answers=(Live,), errors=(NOT_READY,))
async def ready(request: Request) -> Response:
    """Requests are answered. 503 while the model loads or the engine restarts."""
    request.app.state.service.require_ready()
    return _json(Live(True))


@router.get("/models/{name}/versions/{version}")
@Operation(id="kserve_model", tag="KServe", answers=(ServerMetadata,))
async def model(name: str, version: str) -> Response:
    """What the model is, and can."""
    return _json(ServerMetadata(name, version, ["infer", "ready"]))


@router.get("/models/{name}/versions/{version}/ready")
@Operation(id="kserve_model_ready", tag="KServe", answers=(Live,), errors=(NOT_READY,))
async def model_ready(request: Request, name: str, version: str) -> Response:
    """As /v2/health/ready."""
    return await ready(request)


@router.post("/models/{name}/versions/{version}/infer")
@Operation(id="kserve_infer", tag="KServe", takes=(InferRequest,), answers=(InferResponse,), errors=GENERATES)
async def infer(request: Request, name: str, version: str) -> Response:
    """Generate text: one output for each input, in their order."""
    service = begin(request)
    body = await read_json(request, _decoder, service.settings.payload_limit_bytes)
    if not body.inputs or len(body.inputs) != len(body.outputs):
        raise invalid(
            f"`inputs` has {len(body.inputs)} entries and `outputs` {len(body.outputs)}; both need the same number,"
            " at least 1",
            "inputs",
        )
    groups: list[list[GenerationSpec]] = []
    for i, tensor in enumerate(body.inputs):
        inner = GenerateRequest(inputs=_text(tensor, f"inputs[{i}].data"), parameters=body.parameters)
        try:
            groups.append(await generate_specs(inner, service, streaming=False))
        except ApiError as error:
            error.message = f"`inputs[{i}]`: {error.message}"
            raise
    generations = service.generate([spec for specs in groups for spec in specs], record_of(request), "inputs")
    outputs = await unless_client_leaves(request, collect(generations))
    width = len(groups[0])
    texts = [text_of(pick_best(outputs[i : i + width])[0], False) for i in range(0, len(outputs), width)]
    answers = [
        InferOutput(asked.name, [1, len(data)], "BYTES", list(data))
        for asked, data in zip(body.outputs, (text.encode() for text in texts), strict=True)
    ]
    return _json(InferResponse(body.id, answers))


def _text(tensor: InferInput, field: str) -> str:
    try:
        return bytes(tensor.data).decode()
    except ValueError as error:  # a number that is no byte, or bytes that are no text
        raise invalid(f"`{field}` is not the bytes of UTF-8 text: {error}", field) from None


def _json(value: object) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
