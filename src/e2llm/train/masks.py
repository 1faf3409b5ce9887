"""Documents that are kept apart by an attention that holds a whole mask: slower, which is said."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from e2llm.config import Recipe
from e2llm.hf.rotary import unwrap
from e2llm.train.distributed import Processes

_log = logging.getLogger(__name__)


def tell_of_masks(recipe: Recipe, model: nn.Module, processes: Processes) -> None:
    """Log once, on a GPU, that `data.document_mask` under `sdpa` attention costs a T x T mask for each row, and which
    attention holds none. To be called before `attend_far`, which gives the attention another name."""
    config: Any = getattr(unwrap(model), "config", None)
    if not recipe.data.document_mask or processes.rank or not torch.cuda.is_available():
        return
    if getattr(config, "_attn_implementation", None) != "sdpa":
        return
    window = recipe.data.window
    far = " and placement.far_weight=0, which it cannot weigh" if recipe.placement.far_weight else ""
    _log.warning(
        "data.document_mask = true: sdpa attention holds a mask of %d x %d for each row and cannot use a flash kernel; "
        "model.attn_implementation=flex_attention%s holds none, and skips what no document sees",
        window, window, far,
    )  # fmt: skip
