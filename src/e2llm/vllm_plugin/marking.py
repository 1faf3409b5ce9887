"""Recognises an e2llm checkpoint in vLLM's model config and marks it: rope parameters that only the plugin serves, and
the engine's `Scaling`, which travel with the config to every process.

Flows in: a vLLM `ModelConfig`. Flows out: the same, marked, or left alone. Imports no vLLM.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from e2llm.hf.checkpoint import CheckpointInfo
from e2llm.hf.exported import exported_window
from e2llm.positions.choose import DEFAULT_NEW_TOKENS
from e2llm.vllm_plugin.refusals import check_groups, check_model, scaled_rope_parameters
from e2llm.vllm_plugin.scaling import Scaling, make_scaling

SETTINGS_KEY = "e2llm"
"""Key of vLLM's hf_overrides under which an operator gives the plugin's settings."""
_SCALING_KEY = "e2llm_scaling"
"""Attribute of the config that holds the scaling."""


def scaling_of(model_config: Any) -> Scaling | None:
    """The scaling of a marked model; None for any other."""
    raw = getattr(model_config.hf_config, _SCALING_KEY, None)
    return None if raw is None else Scaling.from_json(raw)


def settings_of(model_config: Any) -> dict[str, Any] | None:
    """The operator's settings, {} where there are none in them; None where hf_overrides does not name the plugin."""
    overrides = model_config.hf_overrides
    settings = overrides.get(SETTINGS_KEY) if isinstance(overrides, dict) else None
    if settings is not None and not isinstance(settings, dict):
        raise ValueError(f"hf_overrides.{SETTINGS_KEY} = {settings!r}: give an object, {{}} for the defaults")
    return settings


def extended_checkpoint(model_config: Any) -> CheckpointInfo | None:
    """What e2llm.json says of a folder that serves several scales; None for anything else: other models, exports
    (one fixed scale, said in their config) and checkpoints of method none (their own rotary embedding, always)."""
    folder = Path(model_config.model).expanduser()
    info = CheckpointInfo.load(folder) if folder.is_dir() else None
    if info is None or info.method == "none" or exported_window(model_config.hf_config) is not None:
        return None
    return info


def mark(model_config: Any) -> None:
    """Mark an e2llm checkpoint, or a model that the operator's settings name. Called when vLLM has read the config and
    before it derives the longest request from it. Raises ValueError for what cannot be served."""
    if scaling_of(model_config) is not None:
        return
    info, settings = extended_checkpoint(model_config), settings_of(model_config)
    if info is None and settings is None:
        return
    config = model_config.hf_config
    if info is None and exported_window(config) is not None:
        raise ValueError(
            f"model = {model_config.model!r}: an export, its config is scaled already; leave hf_overrides.e2llm out, "
            "or serve the checkpoint that it was made from"
        )
    check_model(model_config)
    window = int(config.max_position_embeddings)
    scaling = make_scaling(info, window, settings or {})
    check_groups(config, scaling.neighbours)
    config.rope_parameters = scaled_rope_parameters(dict(config.rope_parameters), scaling, window)
    setattr(config, _SCALING_KEY, scaling.to_json())


def default_max_tokens(model_config: Any, defaults: dict[str, Any]) -> dict[str, Any]:
    """Sampling defaults of vLLM's own server: without a limit a marked model writes 1024 tokens, not its largest
    window."""
    return {"max_tokens": DEFAULT_NEW_TOKENS} | defaults if scaling_of(model_config) is not None else defaults
