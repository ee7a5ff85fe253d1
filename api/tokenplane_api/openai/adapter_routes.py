"""vLLM's routes that load and unload LoRA adapters while the server runs. The operator must have allowed it."""

from __future__ import annotations

import os
from typing import Annotated

import msgspec
from fastapi import APIRouter, Request, Response

from tokenplane_core.backend.errors import ConfigError, UnsupportedAdapter

from ..adapters import name_problem
from ..body import read_json
from ..errors import NOT_FOUND, NOT_READY, ApiError, invalid
from ..meaning import means
from ..operations import READS, Operation
from ..service import Service

router = APIRouter(prefix="/v1")

TEXT = "text/plain; charset=utf-8"


class LoadLoRAAdapterRequest(msgspec.Struct, frozen=True):
    lora_name: Annotated[str, means("what requests will call it")]
    lora_path: Annotated[str, means("its folder on the server, with adapter_config.json and adapter_model.safetensors")]


class UnloadLoRAAdapterRequest(msgspec.Struct, frozen=True):
    lora_name: Annotated[str, means("what requests call it")]


_load_decoder = msgspec.json.Decoder(LoadLoRAAdapterRequest)
_unload_decoder = msgspec.json.Decoder(UnloadLoRAAdapterRequest)


@router.post("/load_lora_adapter")
@Operation(
    id="load_lora_adapter",
    tag="OpenAI",
    takes=(LoadLoRAAdapterRequest,),
    text=TEXT,
    errors=(*READS, NOT_FOUND, NOT_READY),
)
async def load_lora_adapter(request: Request) -> Response:
    """Load a LoRA adapter, as in vLLM. Requests may name it once this has answered; others pause while its file is
    read.
    """
    service = _allowed(request)
    body = await read_json(request, _load_decoder, service.settings.payload_limit_bytes)
    service.require_ready()
    problem = name_problem(body.lora_name, service.settings.accepted_names)
    if problem is not None:
        raise invalid(f"`lora_name`: {problem}", "lora_name")
    if not os.path.isdir(body.lora_path):  # False, too, for what can be no path at all
        raise invalid(f"`lora_path` is {body.lora_path[:200]!r}, which is no folder on the server", "lora_path")
    try:
        await service.engine.load_adapter(body.lora_name, body.lora_path)
    except (ConfigError, UnsupportedAdapter) as error:
        raise invalid(str(error), "lora_name" if isinstance(error, ConfigError) else "lora_path") from error
    return _done(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@router.post("/unload_lora_adapter")
@Operation(
    id="unload_lora_adapter",
    tag="OpenAI",
    takes=(UnloadLoRAAdapterRequest,),
    text=TEXT,
    errors=(*READS, NOT_FOUND, NOT_READY),
)
async def unload_lora_adapter(request: Request) -> Response:
    """Unload a LoRA adapter, as in vLLM. New requests are refused at once; those that run with it end with it."""
    service = _allowed(request)
    body = await read_json(request, _unload_decoder, service.settings.payload_limit_bytes)
    service.require_ready()
    if service.engine.adapters.find(body.lora_name) is None:
        raise ApiError(NOT_FOUND, f"no adapter here is called `{body.lora_name}`", "lora_name", "model_not_found")
    service.engine.adapters.unload(body.lora_name)
    return _done(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def _allowed(request: Request) -> Service:
    service: Service = request.app.state.service
    if not service.settings.allow_runtime_lora:
        raise ApiError(
            NOT_FOUND,
            f"{request.url.path} is turned off: it reads folders of the server; the operator may allow it with"
            " --allow-runtime-lora",
            code="unsupported_endpoint",
        )
    return service


def _done(text: str) -> Response:
    return Response(text, media_type=TEXT)
