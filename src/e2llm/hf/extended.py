"""How a checkpoint is extended when it is read: by which method, from which native window, to which scale.

Flows in: a model that is not wrapped yet, what e2llm.json says. Flows out: its `Extension`. Weights are not looked at,
so a model without any (`empty_model`) is extended in the same way.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from e2llm.hf.checkpoint import CheckpointInfo
from e2llm.hf.exported import exported_window
from e2llm.hf.extension import Extension
from e2llm.hf.install import install
from e2llm.hf.rotary import find_rotary_owner
from e2llm.positions.attention import AttentionConfig
from e2llm.positions.choose import parse_schedule


def extend_as_told(
    model: Any,
    name: str,
    info: CheckpointInfo | None,
    *,
    method: str | None = None,
    native_window: int | None = None,
    attention: AttentionConfig | None = None,
    neighbours: int | None = None,
) -> Extension:
    """Wrap the rotary module with `method`, or the checkpoint's own, or for a foreign model yarn where it can be and
    linear where the base already scales; an export is served as it is. `name`: for messages.

    Raises ValueError as `install` does, and for a method on top of an export's scaling.
    """
    scaled_to = exported_window(model.config) if info is None else None
    if scaled_to is not None:
        if method not in (None, "none"):
            raise ValueError(
                f"method = {method!r}: {name!r} is an export, its config is scaled to {scaled_to} tokens already; "
                "leave method out, or load the checkpoint that it was made from"
            )
        method, native_window = "none", native_window or scaled_to
    window = native_window or (info.native_window if info else None)
    if method is None and info is None and attention is None and neighbours is None:
        return _install_default(model, window)
    # Slopes and schedule belong to the method that was trained with them.
    own = info is not None and method in (None, info.method)
    extension = install(
        model,
        method=method or (info.method if info else "yarn"),
        native_window=window,
        attention=attention or (info.attention_config() if own and info is not None else None),
        neighbours=neighbours or ((info.neighbours or None) if own and info is not None else None),
    )
    extension.max_scale = info.max_scale if info else 1.0
    extension.schedule = parse_schedule(info.schedule) if own and info is not None else ()
    return extension


def _install_default(model: nn.Module, native_window: int | None) -> Extension:
    """yarn where the base is unscaled, its own longrope factors where it has them, else linear, which composes."""
    for method in ("yarn", "longrope"):
        try:
            return install(model, method=method, native_window=native_window)
        except ValueError:
            continue
    return install(model, method="linear", native_window=native_window)


class UnknownScaling(ValueError):
    """A config that scales in a way that transformers cannot compute. All else of it may be right."""


def empty_model(config: Any, *, trust_remote_code: bool = False) -> Any:
    """The causal LM that a config says, on the meta device; its rotary module alone holds numbers, on the CPU.

    Raises UnknownScaling where transformers cannot compute its frequencies, ValueError for a config of something else.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise ValueError(f"model type {config.model_type!r}: no causal language model is known for it") from error
    except (KeyError, TypeError) as error:  # of a rope_type it looks up, a factor it divides by: no word that names it
        reason = _not_computed(config)
        if reason is None:
            raise
        raise UnknownScaling(reason) from error
    try:
        owner: Any = find_rotary_owner(model)
    except ValueError:  # no rotary module: nothing of it to compute
        return model
    owner.rotary_emb = type(owner.rotary_emb)(owner.config)
    return model


def unscaled(config: Any) -> Any:
    """A copy of a config with plain frequencies on every layer; its sizes are what they were."""
    plain = copy.deepcopy(config)
    for rope in _ropes(plain):
        rope["rope_type"] = "default"
    return plain


def _ropes(config: Any) -> list[dict[str, Any]]:
    """Rotary parameters of a config, of each kind of layer where it has several."""
    rope = getattr(config.get_text_config(), "rope_parameters", None)
    if not isinstance(rope, dict):
        return []
    return [value for value in rope.values() if isinstance(value, dict)] or [rope]


def _not_computed(config: Any) -> str | None:
    """Which scaling of the config transformers failed at; None where it was something else."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for rope in _ropes(config):
        kind, factor = rope.get("rope_type", "default"), rope.get("factor")
        if kind == "default":
            continue
        if kind not in ROPE_INIT_FUNCTIONS:
            known = ", ".join(("default", *ROPE_INIT_FUNCTIONS))
            return f"rope_type = {kind!r}: not known to transformers, which has {known}"
        if not isinstance(factor, (int, float)):
            return f"rope_type = {kind!r}: factor = {factor!r} is no number"
    return None
