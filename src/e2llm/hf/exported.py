"""The mark in the config of an exported folder, which says that its rotary embedding is scaled already.

A runtime ignores the key; whoever scales must not: `max_position_embeddings` stays the native window on export, so an
exported model would be taken for an unscaled one and scaled twice.
"""

from __future__ import annotations

from typing import Any

EXPORT_MARK = "e2llm_export"
"""Key of config.json; its value: {"scale": g, "window": tokens}."""


def exported_window(config: Any) -> int | None:
    """Window in tokens that an exported model's config is scaled to; None for a model that no export wrote.

    `config`: a transformers config or the parsed config.json. For this model the window is what a native window is for
    others, and method `none` serves it as it is.
    """
    mark = config.get(EXPORT_MARK) if isinstance(config, dict) else getattr(config, EXPORT_MARK, None)
    return int(mark["window"]) if isinstance(mark, dict) and "window" in mark else None
