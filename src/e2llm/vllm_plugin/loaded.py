"""What both model runners ask of a loaded model and of a request: its rotary buffers, its table. Needs vLLM."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase

from e2llm.hf.rotary import is_local
from e2llm.vllm_plugin.admission import SCALE_KEY
from e2llm.vllm_plugin.refusals import check_rotaries
from e2llm.vllm_plugin.rotary import ManyScalesRotary
from e2llm.vllm_plugin.scaling import Scaling


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


def row_start(scaling: Scaling, sampling_params: Any) -> int:
    """First row of the request's table. Raises RuntimeError for a request that was not admitted by the plugin."""
    scale = (getattr(sampling_params, "extra_args", None) or {}).get(SCALE_KEY)
    if scale not in scaling.row_starts:
        raise RuntimeError(f"a request reached the model with scale {scale!r}: the process that took it has no e2llm")
    return scaling.row_starts[scale]
