"""The attention scale: what cos and sin are multiplied by at a scale, while training and when serving. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

YARN_SLOPE = 0.1
"""YaRN Eq. 22."""


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Attention scale 1 + slope * ln(g) on cos and sin, apart for training and serving.

    A served window of g * L tokens holds many times the keys that a training window of R tokens did, and a softmax
    over more keys is flatter; scores must grow with ln(keys) to stay as sharp. YaRN's slope of 0.1 makes up for that
    without training. Trained in, it is learned as part of the scale, and the flattening comes on top when serving.
    """

    training_slope: float | None = None
    """While training; None: the method's own (0.1 for yarn, YaRN Eq. 22; 0 for the others)."""
    slope: float | None = None
    """When serving; None: the same as while training."""

    def __post_init__(self) -> None:
        for name in ("training_slope", "slope"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int | float) and 0 <= value <= 1):
                raise ValueError(f"attention.{name} = {value!r}: use a number between 0 and 1 (YaRN's is 0.1)")

    def serving(self) -> float | None:
        """Slope when serving; None for the method's own."""
        return self.training_slope if self.slope is None else self.slope


def attention_scale(scale: float, slope: float) -> float:
    """slope * ln(g) + 1: YaRN Eq. 22 with its 0.1 as a setting, in transformers' order of operations."""
    return slope * math.log(scale) + 1.0


def check_attention(method: str, attention: AttentionConfig) -> None:
    """Raise ValueError for slopes that `method` does not take."""
    if method == "none" and (attention.training_slope or attention.serving()):
        raise ValueError(
            f"attention.slope = {attention.serving()}: method none is the model as it was at every scale; leave the "
            "attention section out or choose another method"
        )
