"""Groups of a packed row's tokens: how many keys are far from each, and what far keys and far queries are turned by.

Jin et al. 2024 (arXiv 2401.01325, Sect. 3). Flows in: positions and groups of tokens, in numpy. Flows out: numbers for
the device, made once a step, and tables of cos and sin, which every layer uses. Knows no pages and no requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from e2llm.hf.group_tables import PAIRS, Grouping, far_shift, turned

# T = tokens of a step, D = head dim, R = rotated channels


class TokenGroups(NamedTuple):
    """Of a row's tokens, on the host."""

    far: np.ndarray
    """(T,) int64, keys that are far from the token: so many from the request's first on."""
    by: np.ndarray
    """(T, 2) int64, positions that its key and its query are turned on by, from its own place to its group's."""

    def of(self, rows: slice) -> TokenGroups:
        """Of these tokens alone."""
        return TokenGroups(self.far[rows], self.by[rows])


class Turns(NamedTuple):
    """Of a row's tokens, on the device; the same for every layer."""

    tables: torch.Tensor
    """(T, 4, R/2) float32, contiguous: cos and sin for far keys, cos and sin for far queries."""
    pairs: str
    """Which channels are turned together, one of `group_tables.PAIRS`."""

    @property
    def interleaved(self) -> bool:
        return self.pairs != PAIRS[0]

    def of(self, rows: slice) -> Turns:
        """Of these tokens alone."""
        return Turns(self.tables[rows], self.pairs)

    def key(self, key: torch.Tensor) -> torch.Tensor:
        """Far keys of `key` (T, G, D), in its type."""
        cos, sin = self.tables[:, 0, None], self.tables[:, 1, None]
        return turned(key.float(), cos, sin, self.pairs).to(key.dtype)

    def query(self, query: torch.Tensor) -> torch.Tensor:
        """Far queries of `query` (H, T, D), in its type."""
        return turned(query.float(), self.tables[:, 2], self.tables[:, 3], self.pairs).to(query.dtype)


def token_groups(positions: np.ndarray, groups: np.ndarray, neighbours: int) -> TokenGroups:
    """positions (T,), -1 for an empty place; groups (T,), 1: no key is far."""
    far = np.where(groups > 1, np.maximum(positions + 1 - neighbours, 0), 0)
    by = positions // groups - positions
    return TokenGroups(far, np.stack((by, by + far_shift(neighbours, groups)), axis=1))


def turns(by: torch.Tensor, inv_freq: torch.Tensor, pairs: str) -> Turns:
    """by (T, 2) of `TokenGroups`, inv_freq (R/2,), both on the device."""
    angles = by[..., None].float() * inv_freq
    return Turns(torch.stack((angles.cos(), angles.sin()), dim=2).flatten(1, 2), pairs)


def groups_of(grouping: Grouping, scales: Sequence[float], token_scale: np.ndarray) -> np.ndarray:
    """(T,) int64 groups of tokens whose scale is `scales[token_scale]`."""
    used, places = np.unique(token_scale, return_inverse=True)
    return np.array([grouping.group(scales[index]) for index in used], dtype=np.int64)[places]
