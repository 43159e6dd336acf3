"""The app: routes of all subjects, errors in one form, and the gate before them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool
from starlette.middleware.cors import CORSMiddleware

from lorakeet.serve.http.access.gate import Gate, Rules
from lorakeet.serve.http.errors import install_handlers
from lorakeet.serve.http.metrics import Metrics
from lorakeet.serve.http.routes import adapters, chat, completions, encoders, status
from lorakeet.serve.http.service import Service

#: Bytes of the largest body.
LARGEST_BODY = 1 << 21


def make_app(
    service: Service, *, hosts: Collection[str] = (), origins: Collection[str] = (), largest_body: int = LARGEST_BODY
) -> Gate:
    """Return the ASGI app of a service; its engine starts and stops with it.

    Args:
        service: The served model.
        hosts: Names that callers may reach the server by, besides localhost and plain addresses.
        origins: Web pages whose scripts may call, such as ``https://example.org``.
        largest_body: Bytes of a body.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        service.prepare_grammars()
        try:
            yield
        finally:
            await run_in_threadpool(service.engine.stop, True, service.limits.timeout)

    app = FastAPI(title="Lorakeet", lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.service, app.state.metrics = service, Metrics(service.engine, service.base_name)
    for part in (chat, completions, encoders, adapters, status):
        app.include_router(part.router)
    install_handlers(app)
    if origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(origins), allow_methods=["GET", "POST", "DELETE"], allow_headers=["*"]
        )
    return Gate(app, Rules(service.keys, tuple(hosts), tuple(origins), largest_body))
