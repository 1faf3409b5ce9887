"""Training for SelfExtend: windows whose near keys keep their distance and whose far keys are told apart by groups.

Flows in: a model whose windows are placed by a recipe of method none. Flows out: a training in which a scale g is no
longer that of all distances but the window that positions are drawn from (g x L), and by it the group of keys farther
than a quarter of the native window L (Jin et al. 2024, arXiv 2401.01325, Sect. 3), the one that SelfExtend reads such a
window with. Scores are written out, so it is for windows of some hundred tokens.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface

from e2llm.config import Recipe
from e2llm.hf import far_attention
from e2llm.hf.extension import Extension
from e2llm.positions.placement import Placement

# B = batch, H = query heads, T = tokens, D = head dim

LONGEST = 2048
"""Tokens of a training window at most: all its scores are held, twice."""


def check_grouped(recipe: Recipe) -> None:
    """Raise ValueError for a recipe that cannot be trained so."""
    if recipe.method != "none" or recipe.attention.slope or recipe.attention.training_slope:
        raise ValueError(
            f"grouped = true with method = {recipe.method}: the scale is the groups' and not the frequencies'; use "
            "method = none and no slope of attention"
        )
    if not recipe.placement.far_weight or recipe.data.window > LONGEST or recipe.train.compile != "none":
        raise ValueError(
            f"grouped = true: needs placement.far_weight, train.compile = none and a window of at most {LONGEST} "
            f"tokens (data.window = {recipe.data.window})"
        )


@dataclass(frozen=True)
class _Rows:
    """Of one batch."""

    positions: torch.Tensor
    """(B, T)"""
    groups: torch.Tensor
    """(B, 1)"""
    neighbours: int
    inv_freq: torch.Tensor
    """(D / 2,)"""


@contextlib.contextmanager
def grouped_training() -> Iterator[None]:
    """Within it a model that knows far keys reads training windows so; all else is as it was."""
    attend, place = far_attention.far_attention, Extension.place
    batch: list[_Rows] = []

    def placing(self: Extension, placements: Sequence[Placement]) -> None:
        batch[:] = [_rows(self, placements)]
        place(self, placements)

    def attending(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **given: Any
    ) -> Any:
        if not module.training or not batch:
            return attend(module, query, key, value, *args, **given)
        scaling = given.get("scaling") or query.shape[-1] ** -0.5
        return grouped_attention(query, key, value, batch[0], scaling, given.get("far_tables")), None

    far_attention.far_attention, Extension.place = attending, placing  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        far_attention.far_attention, Extension.place = attend, place  # type: ignore[method-assign]
        AttentionInterface.register(far_attention.ATTENTION, attend)  # models that have it look it up by name


def _rows(extension: Extension, placements: Sequence[Placement]) -> _Rows:
    native = extension.native_window
    near = native // 4
    groups = [max(1, math.ceil((native * p.scale - near) / (native - near))) for p in placements]
    positions = torch.from_numpy(np.stack([p.positions for p in placements]))
    return _Rows(positions, torch.tensor(groups)[:, None], near, torch.tensor(extension.rope.inv_freq))


def grouped_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: _Rows, scale: float, far_tables: Any
) -> torch.Tensor:
    """Query (B, H, T, D), key and value of as many heads or fewer, rotated to their own positions -> (B, T, H, D)."""
    shared = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    own, near = rows.positions, rows.neighbours
    grouped, shift = own // rows.groups, near - near // rows.groups
    far = _turned(query, grouped + shift - own, rows) @ _turned(key, grouped - own, rows).transpose(-1, -2)
    distance = own[:, None, :, None] - own[:, None, None, :]
    is_far = (distance >= near) & (rows.groups > 1)[:, :, None, None]
    scores = torch.where(is_far, far, query @ key.transpose(-1, -2)) * scale
    if far_tables is not None:  # the channels of which far keys' weights are products
        of_queries, of_keys = (table[:, :, : query.shape[2]].to(scores.dtype) for table in far_tables)
        scores = scores + of_queries @ of_keys.transpose(-1, -2)
    weights = scores.masked_fill(distance < 0, float("-inf")).softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous()


def _turned(x: torch.Tensor, by: torch.Tensor, rows: _Rows) -> torch.Tensor:
    """(B, H, T, D), each token turned on by so many positions (B, T); channel j is paired with j + D / 2 (Llama)."""
    angles = by[:, None, :, None] * rows.inv_freq
    cos, sin = angles.cos(), angles.sin()
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
