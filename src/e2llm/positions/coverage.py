"""What a recipe's draws cover: positions, distances between tokens, scales (the paper's Figs. 2 and 3, counted).

Flows in: a `PositionSampler`. Flows out: histograms as plain numpy arrays. No torch, no drawing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from e2llm.positions.placement import Placement, PositionSampler
from e2llm.positions.scales import ScalesConfig


@dataclass(frozen=True)
class Coverage:
    """Histograms over many draws."""

    native_window: int
    """L in tokens."""
    distance_edges: np.ndarray
    """(N+1,) tokens: distances between two tokens before division by the scale."""
    scale_edges: np.ndarray
    """(M+1,) ratios: k ± 1/2 where only integers are drawn, so that each has a row; else equal in width, or in ratio
    where the draw is log-uniform."""
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


MOST_ROWS = 128
"""Rows of scales; with more integers than that, several share one."""


def _scale_edges(scales: ScalesConfig, bins: int) -> np.ndarray:
    """(M+1,) edges that suit what is drawn."""
    drawn = {"weighted": scales.values, "log_uniform": (0.5,)}.get(scales.distribution, (scales.max_scale,))
    if all(float(value).is_integer() for value in drawn):
        top = int(scales.max_scale)
        step = -(-top // MOST_ROWS)
        return 0.5 + np.arange(0, top + step, step, dtype=np.float64)
    top_scale = max(scales.max_scale, 1.001)  # all draws 1: one sliver instead of no width at all
    spaced = np.geomspace if scales.distribution == "log_uniform" else np.linspace
    return spaced(1.0, top_scale, min(bins, 32) + 1)


def coverage(
    sampler: PositionSampler, *, num_samples: int = 2000, pairs_per_sample: int = 1024, bins: int = 64
) -> Coverage:
    """Histograms of `num_samples` draws, of all parts of the training where its scales follow a curriculum; token pairs
    are a seeded random subset of each window's."""
    target = sampler.placement.target_window(sampler.scales.max_scale, sampler.native_window)
    distance_edges = np.linspace(0, max(target, sampler.training_window), bins + 1)
    scale_edges = _scale_edges(sampler.scales, bins)
    rng = np.random.Generator(np.random.Philox(key=sampler.seed))
    leading = sampler.placement.sinks
    grid = np.zeros((bins, len(scale_edges) - 1))
    from_leading, positions_seen = np.zeros(bins), np.zeros(bins)
    counts = np.zeros(len(scale_edges) - 1)
    every = max(1, sampler.num_samples // num_samples) if sampler.scales.final_weights else 1
    for index in range(num_samples):
        placement = sampler.draw(every * index)
        where = placement.positions
        low, high = np.sort(rng.integers(leading, len(where), size=(2, pairs_per_sample)), axis=0)
        distances = (where[high] - where[low])[high > low]
        column = min(int(np.searchsorted(scale_edges, placement.scale, side="right")), len(counts)) - 1
        counts[column] += 1
        grid[:, column] += np.histogram(distances, distance_edges)[0]
        positions_seen += np.histogram(where, distance_edges)[0]
        if leading:
            from_leading += np.histogram(where[leading:] - where[0], distance_edges)[0]
    return Coverage(
        native_window=sampler.native_window,
        distance_edges=distance_edges,
        scale_edges=scale_edges,
        distance_scale=grid / grid.sum(),
        leading_distance=from_leading / from_leading.sum() if leading else from_leading,
        position_edges=distance_edges,
        position_counts=positions_seen / positions_seen.sum(),
        scale_counts=counts / counts.sum(),
        examples=tuple(sampler.draw(every * index) for index in range(12)),
    )
