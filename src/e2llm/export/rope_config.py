"""The scale of an export in the words of a transformers config.

Flows in: `rope_parameters` of a config, an `ExportPlan`. Flows out: the rope parameters of the same model at the fixed
scale, and the config.json that holds them. `max_position_embeddings` stays the native window: vLLM, llama.cpp and
others multiply it by the factor themselves.
"""

from __future__ import annotations

import copy
from typing import Any

from e2llm.export.plan import ExportPlan
from e2llm.hf.exported import EXPORT_MARK
from e2llm.hf.rotary import is_local
from e2llm.positions.attention import attention_scale
from e2llm.positions.frequencies import frequencies
from e2llm.positions.rope import Rope

_SCALING = {
    *("rope_type", "type", "factor", "attention_factor", "original_max_position_embeddings", "beta_fast", "beta_slow"),
    *("mscale", "mscale_all_dim", "truncate", "low_freq_factor", "high_freq_factor", "short_factor", "long_factor"),
    "alpha",
}
"""Keys of rope_parameters that say how to scale; the others (rope_theta, partial_rotary_factor, ...) say what."""


def scaled_parameters(parameters: dict[str, Any], rope: Rope, plan: ExportPlan) -> dict[str, Any]:
    """Rope parameters of one layer type at the plan's scale; `parameters` are the base's own.

    Raises ValueError for a scaling that no config can say, naming what can.
    """
    if plan.scale == 1 or plan.method == "none":
        return dict(parameters)
    _check_sayable(rope, plan)
    kept = {key: value for key, value in parameters.items() if key not in _SCALING} | {"rope_theta": rope.base}
    if plan.method == "linear":
        # A linear base divides its frequencies already; dividing again multiplies the factors.
        before = float(parameters.get("factor") or 1.0) if rope.rope_type == "linear" else 1.0
        return kept | {"rope_type": "linear", "factor": before * plan.scale}
    if plan.method == "ntk":
        dim = rope.rotary_dim
        return kept | {"rope_type": "default", "rope_theta": rope.base * plan.scale ** (dim / (dim - 2))}
    if plan.method == "longrope":
        fixed = {**parameters, "short_factor": list(parameters["long_factor"])}
        if plan.slope is not None:
            fixed["attention_factor"] = rope.attention_scale * attention_scale(plan.scale, plan.slope)
        return fixed
    assert plan.method == "yarn"
    scaled = kept | {
        "rope_type": "yarn",
        "factor": plan.scale,
        "original_max_position_embeddings": rope.native_window,
    }
    if not plan.attention_scale_is_own():
        assert plan.slope is not None
        scaled["attention_factor"] = attention_scale(plan.scale, plan.slope)
    return scaled


LONGROPE_ONLY = {"phi3"}
"""Model types whose config class takes rope_type longrope alone."""


def as_longrope(parameters: dict[str, Any], rope: Rope, plan: ExportPlan) -> dict[str, Any]:
    """The plan's frequencies as LongRoPE's divisors, the same inside and beyond the native window.

    Equal up to float32's last bit; the attention scale is said outright.
    """
    if plan.scale == 1 or plan.method in ("none", "longrope"):
        return scaled_parameters(parameters, rope, plan)
    found = frequencies(rope, plan.method, plan.scale, plan.slope)
    values = found.inv_freq.double().tolist()
    dim = rope.rotary_dim
    divisors = [rope.base ** (-2 * j / dim) / value for j, value in enumerate(values)]
    kept = {key: value for key, value in parameters.items() if key not in _SCALING} | {"rope_theta": rope.base}
    return kept | {
        "rope_type": "longrope",
        "short_factor": divisors,
        "long_factor": divisors,
        "original_max_position_embeddings": rope.native_window,
        "attention_factor": found.attention_scale,
    }


def _check_sayable(rope: Rope, plan: ExportPlan) -> None:
    if plan.method in {"linear", "ntk"} and not plan.attention_scale_is_own():
        raise ValueError(
            f"method = {plan.method!r} with attention.slope = {plan.slope:g}: a config of rope_type "
            f"{'linear' if plan.method == 'linear' else 'default'} has no place for an attention scale. Export with "
            "--to gguf, which has one, serve with `e2llm serve`, or train with attention.slope = 0"
        )
    if plan.method == "linear" and rope.rope_type not in {"default", "dynamic", "linear"}:
        raise ValueError(
            f"method = 'linear' on a base whose rope_type is {rope.rope_type!r}: a config holds one scaling, and this "
            "would take two. Export with --scale 1 (the base's own), with --to gguf for a Llama, or serve with "
            "`e2llm serve`"
        )


def scaled_config(raw: dict[str, Any], config: Any, plan: ExportPlan) -> dict[str, Any]:
    """The config.json of the export: `raw` (the base's own, parsed) with the scale in it.

    `config` is what transformers reads from `raw`: there rope_parameters have their v5 form whatever the file's age.
    """
    result = copy.deepcopy(raw)
    text = config.get_text_config()
    target = result if text is config else next(v for v in _sections(result) if v.get("model_type") == text.model_type)
    parameters = copy.deepcopy(dict(text.rope_parameters))
    if None in plan.ropes:
        say = as_longrope if text.model_type in LONGROPE_ONLY else scaled_parameters
        parameters = say(parameters, plan.ropes[None], plan)
        if "rope_theta" in target:  # written by transformers 4: readers of either form find one base
            target["rope_theta"] = parameters["rope_theta"]
    else:
        for layer_type, rope in plan.ropes.items():
            assert layer_type is not None and not is_local(layer_type)
            parameters[layer_type] = scaled_parameters(parameters[layer_type], rope, plan)
    if plan.scale > 1 and plan.method != "none":
        target.pop("rope_scaling", None)
        target["rope_parameters"] = parameters
        if plan.method != "longrope":
            target["max_position_embeddings"] = plan.native_window
            if "original_max_position_embeddings" in target:
                target["original_max_position_embeddings"] = plan.native_window
    result[EXPORT_MARK] = {"scale": plan.scale, "window": plan.scale_window}
    return result


def _sections(raw: dict[str, Any]) -> list[dict[str, Any]]:
    return [value for value in raw.values() if isinstance(value, dict)]
