"""The command line that makes vLLM serve an exported folder at its scale.

vLLM reads the folder's config, with three exceptions that the command line has to mend. Its YaRN multiplied
`original_max_position_embeddings` by the factor for the longest length until 2026, and takes `max_position_embeddings`
as it is since then (vllm-project/vllm#56446): given the scale's window, both serve it. The same YaRN knew no
`attention_factor`, only `attn_factor` on top of its own 0.1 ln(g) + 1: given both keys, each version reads its own.
Unscaled types (ntk is one, with another base) are cut at `max_position_embeddings`; linear at that times the factor,
which falls short where a checkpoint reads past scale times native window. There its YaRN is of no use at all: the
table of cos and sin ends at factor times `original_max_position_embeddings`, and another factor is another set of
frequencies. The same frequencies are said as LongRoPE's divisors then, whose table reaches `max_position_embeddings`.
`hf_overrides` replaces rope_parameters whole, so they repeat everything.
"""

from __future__ import annotations

import json
import math
import shlex
from typing import Any

from e2llm.export.plan import ExportPlan
from e2llm.export.rope_config import as_longrope
from e2llm.positions.attention import YARN_SLOPE, attention_scale


def overrides(plan: ExportPlan, config: dict[str, Any]) -> dict[str, Any]:
    """What --hf-overrides has to say for this export; empty where the config alone does. `config`: config.json.

    Raises ValueError for a window that vLLM's tables do not reach in any words.
    """
    section = text_section(config)
    text = config if section is None else config[section]
    reach = int(plan.scale * plan.native_window)
    said = plan.scale == 1 or text.get("rope_parameters", {}).get("rope_type") == "linear"
    if plan.method == "longrope" or (plan.window <= reach and said):
        return {}
    parameters = text.get("rope_parameters", {})
    linear = plan.method == "linear" and parameters.get("rope_type") != "longrope"  # whose length is not multiplied
    longest = math.ceil(plan.scale_window / plan.scale) if linear else plan.scale_window
    found: dict[str, Any] = {"max_position_embeddings": longest}
    if plan.method == "yarn" and plan.window > reach and parameters.get("rope_type") != "longrope":
        if None not in plan.ropes:
            raise ValueError(
                f"window = {plan.window}: vLLM's YaRN reads {reach} tokens at scale {plan.scale:g}, and a model with "
                f"rope parameters by layer type has no other words for it; export with --scale "
                f"{math.ceil(plan.window / plan.native_window)}, or serve with `e2llm serve`"
            )
        parameters = as_longrope(parameters, plan.ropes[None], plan)
    if parameters.get("rope_type") == "longrope":  # by default it makes an attention scale of the ratio of windows
        scale = parameters["attention_factor"]
        found["rope_parameters"] = {**parameters, "short_mscale": scale, "long_mscale": scale}
    elif plan.method == "yarn" and not plan.attention_scale_is_own():
        if None in plan.ropes:
            found["rope_parameters"] = _with_attn_factor(parameters, plan)
        else:
            scaled = {str(t): _with_attn_factor(parameters[t], plan) for t in plan.ropes}
            found["rope_parameters"] = {**parameters, **scaled}
    return found if section is None else {section: found}


def text_section(config: dict[str, Any]) -> str | None:
    """Name of the section that holds the language model's settings, where it is not the config itself."""
    if "max_position_embeddings" in config or "rope_parameters" in config:
        return None
    sections = [k for k, v in config.items() if isinstance(v, dict) and "rope_parameters" in v]
    return sections[0] if sections else None


def _with_attn_factor(parameters: dict[str, Any], plan: ExportPlan) -> dict[str, Any]:
    assert plan.slope is not None
    ours = attention_scale(plan.scale, plan.slope)
    return {**parameters, "attention_factor": ours, "attn_factor": ours / attention_scale(plan.scale, YARN_SLOPE)}


def command_line(
    folder: str, plan: ExportPlan, config: dict[str, Any], *, adapter_rank: int | None = None, remote_code: bool = False
) -> str:
    """The exact command, quoted for a POSIX shell. `folder` as vLLM is to be given it."""
    words = ["vllm", "serve", folder, "--max-model-len", str(plan.window)]
    found = overrides(plan, config)
    if found:
        words += ["--hf-overrides", json.dumps(found)]
    if adapter_rank is not None:
        ranks = (8, 16, 32, 64, 128, 256, 320, 512)
        rank = next((r for r in ranks if r >= adapter_rank), adapter_rank)
        words += ["--enable-lora", "--max-lora-rank", str(rank), "--lora-modules", f"adapter={folder}/adapter"]
    if remote_code:
        words.append("--trust-remote-code")
    return shlex.join(words)
