"""Probes and metrics: what load balancers, orchestrators and scrapers ask."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from .errors import UNHEALTHY, ApiError
from .metrics import CONTENT_TYPE
from .service import Service

router = APIRouter()

_PROBES = ["GET", "HEAD"]


@router.api_route("/", methods=_PROBES)
@router.api_route("/ping", methods=_PROBES)
@router.api_route("/health", methods=_PROBES)
async def health(request: Request) -> Response:
    """Readiness: may traffic be sent here?"""
    service: Service = request.app.state.service
    if not service.is_ready:
        raise ApiError(UNHEALTHY, "unhealthy")
    return Response()


@router.api_route("/live", methods=_PROBES)
async def live() -> Response:
    """Liveness: the process answers. Also while the model loads or the engine restarts."""
    return Response()


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    service: Service = request.app.state.service
    return Response(service.metrics.render(), media_type=CONTENT_TYPE)
