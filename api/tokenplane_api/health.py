"""Probes and metrics: what load balancers, orchestrators and scrapers ask."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from .errors import UNHEALTHY, ApiError
from .metrics import CONTENT_TYPE
from .operations import Operation
from .service import Service

router = APIRouter()

_PROBES = ["GET", "HEAD"]


@router.api_route("/", methods=_PROBES)
@router.api_route("/ping", methods=_PROBES)
@router.api_route("/health", methods=_PROBES)
@Operation(id="health", tag="Operations", errors=(UNHEALTHY,))
async def health(request: Request) -> Response:
    """Readiness: may traffic be sent here?"""
    service: Service = request.app.state.service
    if not service.is_ready:
        raise ApiError(UNHEALTHY, "unhealthy")
    return Response()


@router.api_route("/live", methods=_PROBES)
@Operation(id="live", tag="Operations")
async def live() -> Response:
    """Liveness: the process answers. Also while the model loads or the engine restarts."""
    return Response()


@router.get("/metrics")
@Operation(id="metrics", tag="Operations", text=CONTENT_TYPE)
async def metrics(request: Request) -> Response:
    """Prometheus metrics: TGI's under its own names, and ours."""
    service: Service = request.app.state.service
    return Response(service.metrics.render(), media_type=CONTENT_TYPE)
