"""The name that a model's forward gives its cache of keys and values: transformers 5.24 renames it."""

from __future__ import annotations

import inspect
from typing import Any

from e2llm.hf.rotary import unwrap


def cache_argument(model: Any, cache: Any) -> dict[str, Any]:
    """Keyword arguments that hand `cache` (or None: a new one) to `model`'s forward and ask for it back."""
    accepts = inspect.signature(unwrap(model).forward).parameters
    return {"cache" if "cache" in accepts else "past_key_values": cache, "use_cache": True}


def cache_of(output: Any) -> Any:
    """The cache that a forward gave back in its `output`."""
    return output.cache if "cache" in output else output.past_key_values
