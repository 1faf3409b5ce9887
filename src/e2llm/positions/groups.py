"""Groups of far keys: how a window longer than the native one is read with frequencies as they are.

SelfExtend (Jin et al. 2024, arXiv 2401.01325, Sect. 3): a key nearer than `neighbours` is seen at its own distance,
another at the distance of groups of `group` tokens, shifted so that the two meet. Trained for, the scale that a window
is drawn with says its group. Flows in: windows or scales, in numbers. Flows out: groups. No torch.
"""

from __future__ import annotations

import math


def usual_neighbours(native_window: int) -> int:
    """Tokens that keep their distance where none are named: a quarter of the native window."""
    return native_window // 4


def check_neighbours(neighbours: int, native_window: int) -> None:
    """Raise ValueError for a band that leaves no token of the native window to groups, or none at its own place."""
    if not 1 <= neighbours < native_window:
        raise ValueError(
            f"neighbours = {neighbours}: use at least 1 and less than the native window ({native_window})"
        )


def group_of(window: int, native_window: int, neighbours: int) -> int:
    """The smallest group whose window, (L - neighbours) * group + neighbours (Sect. 3.3), holds `window` tokens."""
    return max(1, -(-max(0, window - neighbours) // (native_window - neighbours)))


def group_of_scale(scale: float, native_window: int, neighbours: int) -> int:
    """The group of a window of `scale` * L tokens. A product that misses an integer by rounding is that integer."""
    return group_of(math.ceil(native_window * scale * (1 - 1e-12)), native_window, neighbours)
