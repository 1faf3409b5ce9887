"""Which scale a request gets: from the tokens it needs, before its first token is read, and fixed until its last.

A larger scale than needed costs quality on short requests; a scale that changes while keys are cached corrupts them.
No torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Policy = Literal["ladder", "exact"]

DEFAULT_NEW_TOKENS = 1024
"""New tokens of a request that names no limit."""


@dataclass(frozen=True)
class ScaleChoice:
    """The scale of one request."""

    scale: float
    """g, ratio >= 1."""
    window: int
    """Tokens (prompt + new) that fit at this scale: floor(scale * native window), never below the tokens asked for."""
    warning: str | None = None
    """Set when the scale lies outside the range that training drew from."""


def ladder(max_scale: float) -> list[float]:
    """Powers of two below `max_scale`, then `max_scale`: few values, so that requests share batches and caches."""
    _check_max_scale(max_scale)
    steps = [float(2**k) for k in range(math.ceil(math.log2(max_scale)) if max_scale > 1 else 0)]
    return [*steps, float(max_scale)]


def _check_max_scale(max_scale: float) -> None:
    if not math.isfinite(max_scale) or max_scale < 1:
        raise ValueError(f"max_scale = {max_scale!r}: a scale is a finite ratio of at least 1")


def choose_scale(
    num_tokens: int, native_window: int, *, max_scale: float = 1.0, policy: Policy = "ladder"
) -> ScaleChoice:
    """Smallest adequate scale for `num_tokens` (prompt + new tokens), by E2-LLM Sect. 3.3's g = length / L.

    ladder: smallest of 1, 2, 4, ..., max_scale whose window holds the tokens; above max_scale further powers of two.
    exact: max(1, num_tokens / native_window). Beyond `max_scale` (the largest scale training drew) both still answer,
    with a warning in the choice. Raises ValueError for non-positive sizes, a max_scale below 1 or not finite, and
    unknown policies.
    """
    _check_max_scale(max_scale)
    if num_tokens < 1:
        raise ValueError(f"num_tokens = {num_tokens}: a request needs at least one token")
    if native_window < 1:
        raise ValueError(f"native_window = {native_window}: must be at least 1 token")
    needed = max(1.0, num_tokens / native_window)
    if policy == "exact":
        scale = needed
    elif policy == "ladder":
        steps = ladder(max_scale)
        scale = next((s for s in steps if s >= needed), 0.0) or float(2 ** math.ceil(math.log2(needed)))
    else:
        raise ValueError(f"policy = {policy!r}: choose 'ladder' or 'exact'")
    # The scale is adequate, but floor(scale * L) can fall one short of num_tokens by rounding: 4.35 * 100 is 434.99...
    window = max(int(scale * native_window), num_tokens)
    warning = None
    if scale > max_scale:
        warning = (
            f"scale {scale:g} for {num_tokens} tokens is above {max_scale:g}, the largest that training drew: "
            f"quality beyond {int(max_scale * native_window)} tokens was never trained"
        )
    return ScaleChoice(scale, window, warning)
