"""The small-machine engine: llama.cpp over one GGUF file, a context for each scale, a scale for each request.

`from e2llm.llamacpp import LlamaCppEngine`; needs llama-cpp-python, which is loaded when an engine is made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from e2llm.llamacpp.engine import LlamaCppEngine

__all__ = ["LlamaCppEngine"]


def __getattr__(name: str) -> Any:
    if name == "LlamaCppEngine":
        from e2llm.llamacpp.engine import LlamaCppEngine

        return LlamaCppEngine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
