"""A scale per request inside vLLM's continuous batching, and vLLM behind e2llm's own server.

`register` is the entry point `e2llm` of the group `vllm.general_plugins`: vLLM calls it in each of its processes. It
changes nothing for models that are no e2llm checkpoints.
"""

from __future__ import annotations

from typing import Any


def register() -> None:
    """Put the hooks in. Called by vLLM; more than once does no harm."""
    from e2llm.vllm_plugin.hooks import install

    install()


def load_engine(checkpoint: str, **options: Any) -> Any:
    """The `ServingEngine` of `e2llm serve --engine vllm`; options as in `VllmEngine.load`. Raises ValueError with the
    install line where vLLM is not here."""
    from e2llm.vllm_plugin.options import require_vllm

    require_vllm()
    from e2llm.vllm_plugin.engine import VllmEngine

    return VllmEngine.load(checkpoint, **options)
