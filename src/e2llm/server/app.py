"""Puts the app together: routes, page, errors, the edge around it all, and its OpenAPI document.

Flows in: an engine and settings. Flows out: a FastAPI application; needs e2llm[serve].
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.middleware.cors import CORSMiddleware

from e2llm.engine.request import ServingEngine
from e2llm.server.edge import Edge
from e2llm.server.errors import add_handlers
from e2llm.server.page import build_page
from e2llm.server.routes import build_router
from e2llm.server.service import Service
from e2llm.server.settings import ServerSettings
from e2llm.version import __version__

_ABOUT = "One set of weights, any context window: each request is read at the scale that its length asks for."


def build_app(engine: ServingEngine, settings: ServerSettings) -> FastAPI:
    """See `e2llm.server.create_app`."""
    service = Service(engine, settings)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    # The interactive documentation of FastAPI loads assets from elsewhere; the document itself is at /openapi.json.
    app = FastAPI(title="e2llm", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    routers = (build_router(service), build_page())
    for router in routers:
        app.include_router(router)
    add_handlers(app)
    app.openapi = lambda: _openapi(app, bool(settings.api_keys))  # type: ignore[method-assign]
    paths = frozenset(str(getattr(route, "path", "")) for router in routers for route in router.routes)
    app.add_middleware(Edge, service=service, routes=paths)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
            expose_headers=["X-E2LLM-Scale", "X-E2LLM-Window", "X-Request-ID", "Retry-After"],
        )
    return app


def _openapi(app: FastAPI, needs_key: bool) -> dict[str, Any]:
    """FastAPI's document, without its 422: bodies that do not validate are answered with 400."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, description=_ABOUT, routes=app.routes)
        for path, operations in document["paths"].items():
            for operation in operations.values():
                operation["responses"].pop("422", None)
                if needs_key and path.startswith("/v1/"):
                    operation["security"] = [{"key": []}]
        schemas = document["components"]["schemas"]
        schemas.pop("HTTPValidationError", None)
        schemas.pop("ValidationError", None)
        if needs_key:
            document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        app.openapi_schema = document
    return app.openapi_schema
