"""What a recipe's draws cover: positions, distances between tokens, scales (the paper's Figs. 2 and 3, counted).

Flows in: a `PositionSampler`. Flows out: histograms as plain numpy arrays. No torch, no drawing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from e2llm.positions.placement import Placement, PositionSampler


@dataclass(frozen=True)
class Coverage:
    """Histograms over many draws."""

    distance_edges: np.ndarray
    """(N+1,) tokens: distances between two tokens before division by the scale."""
    scale_edges: np.ndarray
    """(M+1,) ratios."""
    distance_scale: np.ndarray
    """(N, M) share of ordinary token pairs with this distance and this scale; sums to 1."""
    leading_distance: np.ndarray
    """(N,) share of (leading token, ordinary token) pairs with this distance; sums to 1 (0 without leading tokens)."""
    position_edges: np.ndarray
    """(N+1,) tokens."""
    position_counts: np.ndarray
    """(N,) share of tokens that stand there; sums to 1."""
    scale_counts: np.ndarray
    """(M,) share of samples with this scale; sums to 1."""
    examples: tuple[Placement, ...]
    """A few draws, to be drawn as strips."""


def coverage(
    sampler: PositionSampler, *, num_samples: int = 2000, pairs_per_sample: int = 1024, bins: int = 64
) -> Coverage:
    """Histograms of `num_samples` draws; token pairs are a seeded random subset of each window's."""
    reach = int(max(sampler.scales.max_scale * sampler.native_window, sampler.training_window))
    distance_edges = np.linspace(0, reach, bins + 1)
    top = max(sampler.scales.max_scale, 2.0)
    scale_edges = np.linspace(1.0, top, min(bins, 32) + 1)
    rng = np.random.Generator(np.random.Philox(key=sampler.seed))
    kinds = {"paper", "jumps"}
    leading = sampler.placement.leading_tokens if sampler.placement.kind in kinds else 0
    grid = np.zeros((bins, len(scale_edges) - 1))
    from_leading, positions_seen = np.zeros(bins), np.zeros(bins)
    scales = np.empty(num_samples)
    for index in range(num_samples):
        placement = sampler.draw(index)
        scales[index] = placement.scale
        where = placement.positions
        low, high = np.sort(rng.integers(leading, len(where), size=(2, pairs_per_sample)), axis=0)
        distances = (where[high] - where[low])[high > low]
        column = min(np.searchsorted(scale_edges, placement.scale, side="right") - 1, grid.shape[1] - 1)
        grid[:, column] += np.histogram(distances, distance_edges)[0]
        positions_seen += np.histogram(where, distance_edges)[0]
        if leading:
            from_leading += np.histogram(where[leading:] - where[0], distance_edges)[0]
    counts = np.histogram(scales, scale_edges)[0]
    return Coverage(
        distance_edges=distance_edges,
        scale_edges=scale_edges,
        distance_scale=grid / grid.sum(),
        leading_distance=from_leading / from_leading.sum() if leading else from_leading,
        position_edges=distance_edges,
        position_counts=positions_seen / positions_seen.sum(),
        scale_counts=counts / counts.sum(),
        examples=tuple(sampler.draw(index) for index in range(12)),
    )
