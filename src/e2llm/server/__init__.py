"""`e2llm serve`: a serving engine behind OpenAI's HTTP interface, and a page to try it on.

Flows in: a `ServingEngine` and `ServerSettings`. Flows out: an ASGI application. Knows no model and no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from e2llm.server.settings import ServerSettings

if TYPE_CHECKING:
    from fastapi import FastAPI

    from e2llm.engine.request import ServingEngine

__all__ = ["ServerSettings", "create_app", "require_extra"]


def require_extra() -> None:
    """Raises ValueError with the line that installs what serving needs, where it is not there."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ValueError(f"{error.name} is not installed: pip install 'e2llm[serve]'") from error


def create_app(engine: ServingEngine, settings: ServerSettings) -> FastAPI:
    """The application over `engine`, which stays the caller's to close. Raises ValueError without e2llm[serve]."""
    require_extra()
    from e2llm.server.app import build_app

    return build_app(engine, settings)
