"""Which scale a training sample gets.

Flows in: a random generator that belongs to one sample. Flows out: its scale g >= 1 (ratio). No torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

Distribution = Literal["uniform_integers", "log_uniform", "weighted", "fixed"]


@dataclass(frozen=True, kw_only=True)
class ScalesConfig:
    """The set G of scales that training draws from, and how."""

    distribution: Distribution = "uniform_integers"
    """uniform_integers: 1, 2, ..., max_scale (the paper, Eq. 6); log_uniform: reals whose logarithm is uniform on
    [0, ln max_scale]; weighted: `values` with `weights`; fixed: always max_scale."""
    max_scale: float = 16.0
    """g_max: the largest scale drawn. The trained range reaches g_max * L tokens."""
    values: tuple[float, ...] = ()
    """For weighted: the scales."""
    weights: tuple[float, ...] = ()
    """For weighted: their relative weights; empty means equal."""
    final_weights: tuple[float, ...] = ()
    """For weighted, where a curriculum is wanted: the relative weights at the end of training. A sample's shares lie on
    the straight line from those of `weights` to these. Empty: they stay. For `e2llm train`, which knows its end."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.max_scale) or self.max_scale < 1:
            raise ValueError(f"scales.max_scale = {self.max_scale!r}: a scale is a finite ratio of at least 1")
        if self.distribution not in SAMPLERS:
            raise ValueError(f"scales.distribution = {self.distribution!r}: choose one of {', '.join(SAMPLERS)}")
        if self.distribution == "uniform_integers" and self.max_scale != int(self.max_scale):
            raise ValueError(
                f"scales.max_scale = {self.max_scale!r}: uniform_integers needs an integer; log_uniform takes reals"
            )
        if self.distribution == "weighted":
            self._check_weighted()
        else:
            for name in ("values", "weights", "final_weights"):
                if getattr(self, name):
                    raise ValueError(
                        f"scales.{name} = {getattr(self, name)!r}: only distribution = 'weighted' takes values and "
                        f"weights, not {self.distribution!r}"
                    )

    def _check_weighted(self) -> None:
        if not self.values or any(not math.isfinite(v) or v < 1 for v in self.values):
            raise ValueError(f"scales.values = {self.values!r}: weighted needs scales of at least 1")
        if max(self.values) != self.max_scale:
            raise ValueError(
                f"scales.max_scale = {self.max_scale!r}: must be the largest of scales.values, {max(self.values)!r}"
            )
        for name in ("weights", "final_weights"):
            weights = getattr(self, name)
            if weights and (len(weights) != len(self.values) or any(not w >= 0 for w in weights)):
                raise ValueError(f"scales.{name} = {weights!r}: give one weight of at least 0 for each of the values")
            if weights and not 0 < sum(weights) < math.inf:
                raise ValueError(f"scales.{name} = {weights!r}: at least one weight must be above 0, and all finite")

    def shares(self, progress: float = 0.0) -> tuple[float, ...]:
        """For weighted: the probability of each of `values` after the part `progress` (0 to 1) of training."""
        begin = _shares(self.weights or (1.0,) * len(self.values))
        if not self.final_weights:
            return begin
        return tuple(a + progress * (b - a) for a, b in zip(begin, _shares(self.final_weights), strict=True))


def _shares(weights: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(np.asarray(weights, dtype=np.float64) / sum(weights))


def _uniform_integers(rng: np.random.Generator, config: ScalesConfig, progress: float) -> float:
    return float(rng.integers(1, int(config.max_scale) + 1))


def _log_uniform(rng: np.random.Generator, config: ScalesConfig, progress: float) -> float:
    return float(math.exp(rng.uniform(0.0, math.log(config.max_scale))))


def _weighted(rng: np.random.Generator, config: ScalesConfig, progress: float) -> float:
    return float(rng.choice(np.asarray(config.values, dtype=np.float64), p=config.shares(progress)))


def _fixed(rng: np.random.Generator, config: ScalesConfig, progress: float) -> float:
    return float(config.max_scale)


SAMPLERS = {
    "uniform_integers": _uniform_integers,
    "log_uniform": _log_uniform,
    "weighted": _weighted,
    "fixed": _fixed,
}


def draw_scale(rng: np.random.Generator, config: ScalesConfig, progress: float = 0.0) -> float:
    """One draw from G after the part `progress` (0 to 1) of training: E2-LLM (arXiv 2401.06951) Eq. 6, and others."""
    return SAMPLERS[config.distribution](rng, config, progress)
