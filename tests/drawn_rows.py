"""Rows of a batch with scales and positions of their own, as training draws them; the first at scale 1."""

from __future__ import annotations

from dataclasses import replace

from architectures import WINDOW

from e2llm.positions.placement import PlacementConfig, PositionSampler
from e2llm.positions.scales import ScalesConfig

TOKENS = 48
SAMPLER = PositionSampler(
    native_window=WINDOW,
    training_window=TOKENS,
    scales=ScalesConfig(distribution="log_uniform", max_scale=32),
    placement=PlacementConfig(kind="jumps"),
    seed=5,
)
ROWS = [replace(SAMPLER.draw(0), scale=1.0), *(SAMPLER.draw(index) for index in (1, 2, 3))]
