"""e2llm: fine-tune a RoPE model once on short windows; serve any window with the right scale for every request.

    model = AutoModelForCausalLM.from_pretrained(...)
    e2llm.extend(model)                  # training now draws scales and positions; use any trainer
    e2llm.save(model, tokenizer, "out")
    e2llm.serve_window(model, 65536)     # or "auto": generate() picks the scale from each request's length

Names are imported when first used, so that `import e2llm` does not pay for torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from e2llm.version import __version__

if TYPE_CHECKING:
    from e2llm.api import extend, load, restore, save, serve_window
    from e2llm.infer import Engine

__all__ = ["Engine", "__version__", "extend", "load", "restore", "save", "serve_window"]


def __getattr__(name: str) -> Any:
    if name in {"extend", "load", "restore", "save", "serve_window"}:
        from e2llm import api

        return getattr(api, name)
    if name == "Engine":
        from e2llm.infer import Engine

        return Engine
    raise AttributeError(f"module 'e2llm' has no attribute {name!r}")
