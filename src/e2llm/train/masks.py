"""An attention that is slower than it need be, which is said: whole masks that keep documents apart, and float32 where
heads share keys."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from e2llm.config import Recipe
from e2llm.hf.rotary import unwrap
from e2llm.train.distributed import Processes

_log = logging.getLogger(__name__)


def tell_of_slow_attention(recipe: Recipe, model: nn.Module, processes: Processes) -> None:
    """Log once, on a GPU, what `sdpa` attention costs where it finds no flash kernel, and which setting has one. To be
    called before `attend_far`, which gives the attention another name."""
    config: Any = getattr(unwrap(model), "config", None)
    if processes.rank or not torch.cuda.is_available() or getattr(config, "_attn_implementation", None) != "sdpa":
        return
    window = recipe.data.window
    if recipe.data.document_mask:
        far = " and placement.far_weight=0, which it cannot weigh" if recipe.weighs_by_channels else ""
        _log.warning(
            "data.document_mask = true: sdpa attention holds a mask of %d x %d for each row and cannot use a flash "
            "kernel; model.attn_implementation=flex_attention%s holds none, and skips what no document sees",
            window, window, far,
        )  # fmt: skip
        return
    text = config.get_text_config()
    heads, keys = text.num_attention_heads, getattr(text, "num_key_value_heads", None)
    if recipe.train.precision == "float32" and keys and keys < heads:
        # As measured with PyTorch 2.11; with a mask transformers repeats the keys, and there is one.
        _log.warning(
            "train.precision = float32: sdpa attention has no kernel for it where %d heads share %d of keys, and holds "
            "scores of %d x %d for each head; train.precision=bfloat16 has one",
            heads, keys, window, window,
        )  # fmt: skip
