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
        elif self.values or self.weights:
            raise ValueError(
                f"scales.values = {self.values!r}: only distribution = 'weighted' takes values and weights, "
                f"not {self.distribution!r}"
            )

    def _check_weighted(self) -> None:
        if not self.values or any(not math.isfinite(v) or v < 1 for v in self.values):
            raise ValueError(f"scales.values = {self.values!r}: weighted needs scales of at least 1")
        if max(self.values) != self.max_scale:
            raise ValueError(
                f"scales.max_scale = {self.max_scale!r}: must be the largest of scales.values, {max(self.values)!r}"
            )
        if self.weights and (len(self.weights) != len(self.values) or any(w < 0 for w in self.weights)):
            raise ValueError(f"scales.weights = {self.weights!r}: give one weight of at least 0 for each of the values")
        if self.weights and sum(self.weights) <= 0:
            raise ValueError(f"scales.weights = {self.weights!r}: at least one weight must be above 0")


def _uniform_integers(rng: np.random.Generator, config: ScalesConfig) -> float:
    return float(rng.integers(1, int(config.max_scale) + 1))


def _log_uniform(rng: np.random.Generator, config: ScalesConfig) -> float:
    return float(math.exp(rng.uniform(0.0, math.log(config.max_scale))))


def _weighted(rng: np.random.Generator, config: ScalesConfig) -> float:
    weights = np.asarray(config.weights or [1.0] * len(config.values), dtype=np.float64)
    return float(rng.choice(np.asarray(config.values, dtype=np.float64), p=weights / weights.sum()))


def _fixed(rng: np.random.Generator, config: ScalesConfig) -> float:
    return float(config.max_scale)


SAMPLERS = {
    "uniform_integers": _uniform_integers,
    "log_uniform": _log_uniform,
    "weighted": _weighted,
    "fixed": _fixed,
}


def draw_scale(rng: np.random.Generator, config: ScalesConfig) -> float:
    """One draw from G: E2-LLM (arXiv 2401.06951) Eq. 6 and its variants."""
    return SAMPLERS[config.distribution](rng, config)
