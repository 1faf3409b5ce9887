"""Checkpoints at one fixed scale, as folders and files that other runtimes serve without us, and the proof of it.

`from e2llm.export import export`; torch is loaded when the function is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from e2llm.export.run import ExportResult, export

__all__ = ["ExportResult", "export"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        import e2llm.export.run

        return getattr(e2llm.export.run, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
