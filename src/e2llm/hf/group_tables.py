"""What tells a model's attention in which groups a batch's far keys stand.

Flows in: scales, or placements of training windows. Flows out: tables, which the base model's forward hands down to its
layers' attention (`hf.self_extend`). Knows no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from e2llm.hf.row_tables import sent
from e2llm.positions.groups import group_of_scale
from e2llm.positions.placement import Placement

# B = batch, T = tokens, D = head dim, R = rotated channels

GROUP_TABLES = "group_tables"
"""Argument of the base model's forward that its layers hand on to their attention."""
Group = TypeVar("Group", int, np.ndarray)
PAIRS = ("halves", "neighbours")
"""halves: channel j is turned with j + R/2 (Llama); neighbours: 2j with 2j + 1 (GLM, Cohere)."""


class Grouping(NamedTuple):
    """How a model's keys are told apart, at any scale."""

    native_window: int
    """L in tokens."""
    neighbours: int
    """Keys nearer than so many tokens stand at their own distance."""
    inv_freq: tuple[float, ...]
    """(R/2,) radians a token, which keys and queries are rotated by."""
    pairs: str = PAIRS[0]
    """Which channels are turned together, one of PAIRS."""

    def group(self, scale: float) -> int:
        """Of windows of `scale` * L tokens."""
        return group_of_scale(scale, self.native_window, self.neighbours)


def far_shift(neighbours: int, group: Group) -> Group:
    """Places that a far query stands behind its group, so that far distances go on where near ones end (Sect. 3.2 of
    arXiv 2401.01325). Of one group or of an array of them."""
    return neighbours - neighbours // group


class Documents(NamedTuple):
    """Of rows in which several stand, one after the other, each to be seen alone."""

    lengths: torch.Tensor
    """(N,) int64 in tokens, on the host, row by row."""
    owners: torch.Tensor
    """(B, T) int64: the document of each token."""


class GroupTables(NamedTuple):
    """Of rows that are read from their beginning, at a scale that is set."""

    groups: torch.Tensor
    """(B or 1,) int64, on the host."""
    inv_freq: torch.Tensor
    """(R/2,) float32."""
    neighbours: int
    pairs: str
    documents: Documents | None = None


class PlacedGroups(NamedTuple):
    """Of training windows, each at places of its own, or of the documents in them."""

    positions: torch.Tensor
    """(B, T) int64, rising."""
    groups: torch.Tensor
    """(B,) int64; (N,) of documents."""
    segments: torch.Tensor
    """(B, T) int64, from 0."""
    bias: torch.Tensor
    """(B, T) float32: taken off the scores of a query with its own segment and the leading tokens, which weighs all
    others (`positions.far`)."""
    leading: int
    of_queries: tuple[torch.Tensor, torch.Tensor]
    """cos and sin (B, 1, T, R/2) float32 of what a far query is turned by, from its own place to its group's."""
    of_keys: tuple[torch.Tensor, torch.Tensor]
    neighbours: int
    pairs: str
    documents: Documents | None = None


def documents_of(lengths: Sequence[Sequence[int]], device: torch.device) -> Documents:
    """`lengths`: tokens of each document of each row, rows of one length."""
    flat = np.array([length for row in lengths for length in row])
    owners = np.repeat(np.arange(len(flat)), flat).reshape(len(lengths), -1)
    return Documents(torch.from_numpy(flat), sent(torch.from_numpy(owners), device))


def group_tables(scales: Sequence[float], grouping: Grouping, device: torch.device) -> GroupTables:
    """Tables of rows at `scales`, one for each or one for all."""
    groups = torch.tensor([grouping.group(scale) for scale in scales])
    inv_freq = sent(torch.tensor(grouping.inv_freq), device)
    return GroupTables(groups, inv_freq, grouping.neighbours, grouping.pairs)


def placed_groups(
    placements: Sequence[Placement],
    grouping: Grouping,
    device: torch.device,
    lengths: Sequence[Sequence[int]] | None = None,
) -> PlacedGroups:
    """Tables of windows of one length, or of the documents in them, of these `lengths`; on `device` without a wait."""
    rows = len(placements) if lengths is None else len(lengths)
    far = [p.far for p in placements]

    def stacked(found: list[np.ndarray]) -> np.ndarray:
        return np.concatenate(found).reshape(rows, -1)

    none = [np.zeros(len(p.positions), np.int64) for p in placements]
    positions = stacked([p.positions for p in placements])
    segments = stacked([n if f is None else f.segments for n, f in zip(none, far, strict=True)])
    bias = stacked([n if f is None else f.bias for n, f in zip(none, far, strict=True)]).astype(np.float32)
    groups = np.array([grouping.group(p.scale) for p in placements])
    of_tokens = stacked([n + group for n, group in zip(none, groups, strict=True)])
    shift = far_shift(grouping.neighbours, of_tokens)
    grouped = positions // of_tokens
    inv_freq = sent(torch.tensor(grouping.inv_freq), device)
    return PlacedGroups(
        sent(torch.from_numpy(positions), device),
        sent(torch.from_numpy(groups), device),
        sent(torch.from_numpy(segments), device),
        sent(torch.from_numpy(bias), device),
        0 if far[0] is None else far[0].leading_tokens,
        _angles(grouped + shift - positions, inv_freq),
        _angles(grouped - positions, inv_freq),
        grouping.neighbours,
        grouping.pairs,
        None if lengths is None else documents_of(lengths, device),
    )


def _angles(by: np.ndarray, inv_freq: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    angles = sent(torch.from_numpy(by), inv_freq.device)[:, None, :, None].float() * inv_freq
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, by: torch.Tensor, inv_freq: torch.Tensor, pairs: str) -> torch.Tensor:
    """`x` (…, T, D) with its first R channels turned by `by` (T,) or (…, T) positions; the others stay."""
    angles = by.to(x.device)[..., None].float() * inv_freq  # (…, T, R/2)
    return turned(x, angles.cos(), angles.sin(), pairs)


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, pairs: str) -> torch.Tensor:
    """`x` (…, T, D) with its first R channels turned by angles whose cos and sin are given, (…, T, R/2)."""
    channels = 2 * cos.shape[-1]
    own, rest = x[..., :channels], x[..., channels:]
    if pairs == "halves":
        a, b = own.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)
    a, b = own[..., 0::2], own[..., 1::2]
    both = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    return torch.cat((both, rest), dim=-1)
