"""What both model runners ask of a loaded model and of a request: its rotary buffers and how its keys are grouped, its
table and its group. Needs vLLM."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase

from e2llm.hf.group_tables import PAIRS, Grouping
from e2llm.hf.rotary import is_local
from e2llm.vllm_plugin.admission import SCALE_KEY
from e2llm.vllm_plugin.refusals import check_attentions, check_rotaries
from e2llm.vllm_plugin.rotary import ManyScalesRotary
from e2llm.vllm_plugin.scaling import Scaling
from e2llm.vllm_plugin.tables import unscaled_rope


def find_rotaries(model: nn.Module, model_config: Any) -> list[torch.Tensor]:
    """`row_starts` of each of our rotary modules. Raises ValueError for a model with others, or without ours."""
    modules = {id(module): module for module in model.modules()}.values()
    ours = [module for module in modules if isinstance(module, ManyScalesRotary)]
    others = [
        type(module).__name__
        for module in modules
        if not isinstance(module, ManyScalesRotary)
        and (isinstance(module, RotaryEmbeddingBase) or "RotaryEmb" in type(module).__name__)
        and type(module).__name__ != "ApplyRotaryEmb"  # the arithmetic alone: reads no table
    ]
    config = model_config.hf_text_config
    types = {*(getattr(config, "layer_types", None) or ()), *config.rope_parameters}
    check_rotaries(others, len(ours), config.model_type, any(is_local(layer_type) for layer_type in types))
    return [module.row_starts for module in ours]


def find_grouping(model: nn.Module, vllm_config: Any, scaling: Scaling) -> Grouping | None:
    """How the model's keys are grouped; None with methods without groups. Raises ValueError where its layers rotate
    differently, or attend by what knows no groups."""
    if not scaling.neighbours:
        return None
    ours = {id(m): m for m in model.modules() if isinstance(m, ManyScalesRotary)}.values()
    rotated = {(m.rotary_dim, m.base, m.is_neox_style) for m in ours}
    layers: dict[str, Any] = get_layers_from_vllm_config(vllm_config, AttentionLayerBase)  # type: ignore[type-abstract]
    names = {layer.get_attn_backend().get_name() for layer in layers.values()}
    check_attentions(names, len(rotated), vllm_config.model_config.hf_text_config.model_type)
    ((rotary_dim, base, halves),) = rotated
    inv_freq = unscaled_rope(rotary_dim, base, scaling.native_window).inv_freq
    return Grouping(scaling.native_window, scaling.neighbours, inv_freq, PAIRS[0] if halves else PAIRS[1])


def scale_of(scaling: Scaling, sampling_params: Any) -> float:
    """The request's scale, one of `scaling.scales`. Raises RuntimeError for a request that was not admitted by the
    plugin."""
    scale = (getattr(sampling_params, "extra_args", None) or {}).get(SCALE_KEY)
    if scale not in scaling.row_starts:
        raise RuntimeError(f"a request reached the model with scale {scale!r}: the process that took it has no e2llm")
    return float(scale)
