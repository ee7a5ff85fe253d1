"""KServe's inference protocol, version 2, in the form that TGI speaks: tensors of bytes that are UTF-8 text.

Names and versions of models in paths are echoed, not checked: there is one model.
"""

from __future__ import annotations

import msgspec
from fastapi import APIRouter, Request, Response

from .. import __version__
from ..body import read_json
from ..errors import ApiError, invalid
from ..generation import GenerationSpec, collect
from ..request_scope import record_of
from ..service import begin
from ..streaming import unless_client_leaves
from .convert import generate_specs
from .render import pick_best, text_of
from .schemas import GenerateRequest, Parameters

router = APIRouter(prefix="/v2")


class InferInput(msgspec.Struct, frozen=True):
    name: str
    shape: list[int]  # not read: `data` says how long it is
    datatype: str  # not read: always text
    data: list[int]  # bytes of UTF-8 text


class InferOutput(msgspec.Struct, frozen=True):
    name: str


class InferRequest(msgspec.Struct, frozen=True):
    id: str
    inputs: list[InferInput]
    outputs: list[InferOutput]
    parameters: Parameters = Parameters(do_sample=True)


_decoder = msgspec.json.Decoder(InferRequest)


@router.get("")
async def server() -> Response:
    return _json(
        {
            "name": "text-generation-inference",
            "version": __version__,
            "extensions": ["health", "models", "metrics"],
        }
    )


@router.get("/health/live")
async def live() -> Response:
    return _json({"live": True})


@router.get("/health/ready")
async def ready(request: Request) -> Response:
    """503 while the model loads or the engine restarts."""
    request.app.state.service.require_ready()
    return _json({"live": True})


@router.get("/models/{name}/versions/{version}")
async def model(name: str, version: str) -> Response:
    return _json({"name": name, "version": version, "extensions": ["infer", "ready"]})


@router.get("/models/{name}/versions/{version}/ready")
async def model_ready(request: Request, name: str, version: str) -> Response:
    return await ready(request)


@router.post("/models/{name}/versions/{version}/infer")
async def infer(request: Request, name: str, version: str) -> Response:
    """One output for each input, in their order; the parameters hold for all."""
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
        {"name": asked.name, "shape": [1, len(data)], "datatype": "BYTES", "data": list(data)}
        for asked, data in zip(body.outputs, (text.encode() for text in texts), strict=True)
    ]
    return _json({"id": body.id, "outputs": answers})


def _text(tensor: InferInput, field: str) -> str:
    try:
        return bytes(tensor.data).decode()
    except ValueError as error:  # a number that is no byte, or bytes that are no text
        raise invalid(f"`{field}` is not the bytes of UTF-8 text: {error}", field) from None


def _json(value: object) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
