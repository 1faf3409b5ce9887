"""The same formulas in float64 numpy, written from the papers: the oracle that the float32 tables are tested against.

Not used at run time. D = rotary_dim, L = native window, g = scale.
"""

from __future__ import annotations

import math

import numpy as np

Array = np.ndarray


def plain_inv_freq(base: float, rotary_dim: int) -> Array:
    """theta_j = base^(-2j/D), (D/2,) float64: Su et al. 2021 (arXiv 2104.09864) Eq. 15."""
    return np.power(base, -np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim)


def linear_inv_freq(base: float, rotary_dim: int, scale: float) -> Array:
    """theta_j / g: Chen et al. 2023 (arXiv 2306.15595) Eq. 4."""
    return plain_inv_freq(base, rotary_dim) / scale


def ntk_inv_freq(base: float, rotary_dim: int, scale: float) -> Array:
    """theta_j of base * g^(D/(D-2)): YaRN (arXiv 2309.00071) Eq. 16."""
    return plain_inv_freq(base * scale ** (rotary_dim / (rotary_dim - 2)), rotary_dim)


def yarn_inv_freq(
    base: float, rotary_dim: int, scale: float, native_window: int, beta_fast: float = 32.0, beta_slow: float = 1.0
) -> Array:
    """(1 - gamma) theta_j / g + gamma theta_j: YaRN Eqs. 17-20, the ramp over rounded channel indices."""
    theta = plain_inv_freq(base, rotary_dim)

    def channel(rotations: float) -> float:
        return rotary_dim * math.log(native_window / (2 * math.pi * rotations)) / (2 * math.log(base))

    low = max(math.floor(channel(beta_fast)), 0)
    high = min(math.ceil(channel(beta_slow)), rotary_dim - 1)
    width = (high - low) or 0.001
    interpolate = np.clip((np.arange(rotary_dim // 2) - low) / width, 0.0, 1.0)
    return theta * (1 - interpolate) + theta / scale * interpolate


def yarn_attention_scale(scale: float) -> float:
    """0.1 ln(g) + 1: YaRN Eq. 22."""
    return 0.1 * math.log(scale) + 1.0


def rotation_tables(inv_freq: Array, positions: Array, attention_scale: float = 1.0) -> tuple[Array, Array]:
    """Cos and sin (..., T, D/2) float64 of positions (..., T): angle m * theta_j."""
    angles = np.asarray(positions, dtype=np.float64)[..., None] * inv_freq
    return np.cos(angles) * attention_scale, np.sin(angles) * attention_scale


def rotate_half_split(x: Array, cos: Array, sin: Array) -> Array:
    """Rotate x (..., T, D) float64, channel j paired with j + D/2 (the layout of Llama in transformers)."""
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
