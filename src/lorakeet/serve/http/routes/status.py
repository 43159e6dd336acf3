"""Routes about the server: health, readiness, models, figures."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from lorakeet.serve.http.errors import ApiError
from lorakeet.serve.http.metrics import CONTENT_TYPE, Metrics
from lorakeet.serve.http.service import Served, Service

router = APIRouter()


@router.get("/health")
async def health() -> dict[str, str]:
    """Tell that the process answers; the one route without a key."""
    return {"status": "ok"}


@router.get("/ready")
async def ready(service: Served) -> dict[str, str]:
    """Tell whether the engine takes requests."""
    if not service.engine.is_running:
        raise ApiError(503, "the engine takes no requests", code="not_ready")
    return {"status": "ready"}


@router.get("/metrics")
def metrics(request: Request) -> Response:
    """Return the figures in the form of Prometheus."""
    kept: Metrics = request.app.state.metrics
    return Response(kept.text(), headers={"Content-Type": CONTENT_TYPE})


@router.get("/v1/models")
async def models(service: Served) -> dict[str, Any]:
    """List the base and the adapters, each with its base as parent."""
    return {"object": "list", "data": _cards(service)}


@router.get("/v1/models/{model:path}")
async def model(model: str, service: Served) -> dict[str, Any]:
    """Describe one model."""
    service.adapter(model)
    return next(card for card in _cards(service) if card["id"] == model)


def _cards(service: Service) -> list[dict[str, Any]]:
    names: list[tuple[str, str | None]] = [(service.base_name, None)]
    names += [(one.name, service.base_name) for one in service.engine.residents.list()]
    common = {"object": "model", "created": service.started, "owned_by": "lorakeet"}
    return [{"id": name, **common, "root": service.base_name, "parent": parent} for name, parent in names]
