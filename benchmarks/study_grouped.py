"""Training for SelfExtend: windows whose near keys keep their distance and whose far keys are told apart by groups.

Flows in: a model whose windows are placed by a recipe of method none. Flows out: a training in which a scale g is no
longer that of all distances but the window that positions are drawn from (g x L), and by it the group of keys farther
than a quarter of the native window L (Jin et al. 2024, arXiv 2401.01325, Sect. 3), the one that SelfExtend reads such a
window with. On a CPU scores are written out, so there it is for windows of some hundred tokens. On a GPU it is flex
attention over every key twice, of which a query sees the one or the other.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.attention import flex_attention as flex
from transformers import AttentionInterface

from e2llm.config import Recipe
from e2llm.hf import far_attention
from e2llm.hf.extension import Extension
from e2llm.hf.self_extend import group_of, rotate, usual_neighbours
from e2llm.positions.placement import Placement

# B = batch, H = query heads, T = tokens, D = head dim

LONGEST = 2048
"""Tokens of a training window at most on a CPU, where all its scores are held, twice."""


def check_grouped(recipe: Recipe) -> None:
    """Raise ValueError for a recipe that cannot be trained so."""
    if recipe.method != "none" or recipe.attention.slope or recipe.attention.training_slope:
        raise ValueError(
            f"grouped = true with method = {recipe.method}: the scale is the groups' and not the frequencies'; use "
            "method = none and no slope of attention"
        )
    if not recipe.placement.far_weight or recipe.train.compile != "none":
        raise ValueError("grouped = true: needs placement.far_weight, whose attention it is, and train.compile = none")


def check_window(recipe: Recipe) -> None:
    """Raise ValueError for windows whose scores this machine cannot hold."""
    if recipe.data.window > LONGEST and not torch.cuda.is_available():
        raise ValueError(f"grouped = true: data.window = {recipe.data.window} without a GPU; use at most {LONGEST}")


@dataclass(frozen=True)
class Rows:
    """Of one batch."""

    positions: torch.Tensor
    """(B, T)"""
    groups: torch.Tensor
    """(B, 1)"""
    segments: torch.Tensor
    """(B, T)"""
    bias: torch.Tensor
    """(B, T) float32, taken off the scores of each query with its own segment and the leading tokens."""
    leading: int
    neighbours: int
    inv_freq: torch.Tensor
    """(D / 2,)"""

    @classmethod
    def of(cls, extension: Extension, placements: Sequence[Placement], device: torch.device | str = "cpu") -> Rows:
        native = extension.native_window
        near = usual_neighbours(native)
        groups = [group_of(math.ceil(native * p.scale), native, near) for p in placements]
        far = [p.far for p in placements]
        positions = np.stack([p.positions for p in placements])
        nothing = np.zeros_like(positions[0])
        segments = np.stack([nothing if f is None else f.segments for f in far])
        bias = np.stack([nothing if f is None else f.bias for f in far])
        return cls(
            torch.from_numpy(positions).to(device),
            torch.tensor(groups, device=device)[:, None],
            torch.from_numpy(segments).to(device),
            torch.from_numpy(bias).float().to(device),
            0 if far[0] is None else far[0].leading_tokens,
            near,
            torch.tensor(extension.rope.inv_freq, device=device),
        )

    @functools.cached_property
    def mask(self) -> flex.BlockMask:
        """Of which of all keys twice, near ones first, each query sees."""
        positions, groups, near, tokens = self.positions, self.groups, self.neighbours, self.positions.shape[1]

        def seen(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            distance = positions[b, q] - positions[b, k % tokens]
            is_far = (distance >= near) & (groups[b, 0] > 1)
            return (distance >= 0) & (is_far == (k >= tokens))

        batch = self.positions.shape[0]
        return flex.create_block_mask(seen, batch, None, tokens, 2 * tokens, device=str(self.positions.device))


@contextlib.contextmanager
def grouped_training() -> Iterator[None]:
    """Within it a model that knows far keys reads training windows so; all else is as it was."""
    attend, place = far_attention.far_attention, Extension.place
    batch: list[Rows] = []

    def placing(self: Extension, placements: Sequence[Placement]) -> None:
        batch[:] = [Rows.of(self, placements, next(self._wrapper.inner.buffers()).device)]
        place(self, placements)

    def attending(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **given: Any
    ) -> Any:
        if not module.training or not batch:
            return attend(module, query, key, value, *args, **given)
        grouped = by_flex if query.is_cuda else written_out
        return grouped(query, key, value, batch[0], given.get("scaling") or query.shape[-1] ** -0.5), None

    far_attention.far_attention, Extension.place = attending, placing  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        far_attention.far_attention, Extension.place = attend, place  # type: ignore[method-assign]
        AttentionInterface.register(far_attention.ATTENTION, attend)  # models that have it look it up by name


def written_out(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: Rows, scale: float
) -> torch.Tensor:
    """Query (B, H, T, D), key and value of as many heads or fewer, rotated to their own positions -> (B, T, H, D)."""
    shared = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    far_query, far_key = _in_groups(query, key, rows)
    distance = rows.positions[:, None, :, None] - rows.positions[:, None, None, :]
    is_far = (distance >= rows.neighbours) & (rows.groups > 1)[:, :, None, None]
    scores = torch.where(is_far, far_query @ far_key.transpose(-1, -2), query @ key.transpose(-1, -2)) * scale
    same = rows.segments[:, :, None] == rows.segments[:, None, :]
    same |= torch.arange(same.shape[-1]) < rows.leading
    scores = scores - (rows.bias[:, :, None] * same)[:, None]
    weights = scores.masked_fill(distance < 0, float("-inf")).softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous()


def by_flex(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: Rows, scale: float) -> torch.Tensor:
    """The same. Queries are their near selves beside their far ones; a near key has zeros beside it, a far one before
    it: each score is of the one kind, and one softmax goes over both."""
    far_query, far_key = _in_groups(query, key, rows)
    tokens, nothing = key.shape[2], torch.zeros_like(key)
    both = torch.cat((torch.cat((key, nothing), -1), torch.cat((nothing, far_key), -1)), 2)
    segments, bias, leading = rows.segments, rows.bias, rows.leading

    def weighed(
        score: torch.Tensor, b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor
    ) -> torch.Tensor:
        at = k % tokens
        return torch.where((segments[b, q] == segments[b, at]) | (at < leading), score - bias[b, q], score)

    found = _flex(query.is_cuda)(
        torch.cat((query, far_query), -1),
        both,
        torch.cat((value, value), 2),
        score_mod=weighed,
        block_mask=rows.mask,
        scale=scale,
        enable_gqa=True,
    )
    return found.transpose(1, 2).contiguous()


@functools.cache
def _flex(compiled: bool) -> Any:
    return torch.compile(flex.flex_attention) if compiled else flex.flex_attention


def _in_groups(query: torch.Tensor, key: torch.Tensor, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    own, near = rows.positions, rows.neighbours
    grouped, shift = own // rows.groups, near - near // rows.groups
    return _turned(query, grouped + shift - own, rows), _turned(key, grouped - own, rows)


def _turned(x: torch.Tensor, by: torch.Tensor, rows: Rows) -> torch.Tensor:
    """(B, H, T, D), each token turned on by so many positions (B, T), channels paired as Llama's."""
    return rotate(x.float(), by[:, None], rows.inv_freq, "halves").to(x.dtype)
