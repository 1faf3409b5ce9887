"""Serving engines: many requests at once, each at its own scale.

`from e2llm.engine import BatchEngine, Request, Sampling`; torch is loaded when `BatchEngine` is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from e2llm.engine.request import (
    Admission,
    EngineStats,
    Output,
    RefusedError,
    Request,
    Sampling,
    ServingEngine,
    Stream,
    TokenLogprob,
)

if TYPE_CHECKING:
    from e2llm.engine.batch import BatchEngine

__all__ = [
    "Admission",
    "BatchEngine",
    "EngineStats",
    "Output",
    "RefusedError",
    "Request",
    "Sampling",
    "ServingEngine",
    "Stream",
    "TokenLogprob",
]


def __getattr__(name: str) -> Any:
    if name == "BatchEngine":
        from e2llm.engine.batch import BatchEngine

        return BatchEngine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
