"""Which scale a request gets: from the tokens it needs, before its first token is read, and fixed until its last.

A larger scale than needed costs quality on short requests; a scale that changes while keys are cached corrupts them.
A schedule says which scale reads windows up to which length. Without a calibrated one it is the ladder 1, 2, 4, ...,
g_max, each step with the window g * L. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

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


@dataclass(frozen=True)
class Step:
    """Requests of up to `window` tokens are read at `scale`."""

    window: int
    """Tokens, prompt and new."""
    scale: float
    """g, ratio >= 1. May lie below window / L: a model that was trained at every distance reads somewhat past g * L,
    and a smaller scale keeps more resolution."""


Schedule = tuple[Step, ...]
"""Steps, windows rising; () is the ladder."""


def parse_schedule(rows: Sequence[Mapping[str, Any]]) -> Schedule:
    """Schedule from plain values [{"window": …, "scale": …}, …]. Raises ValueError naming the row that cannot be."""
    steps: list[Step] = []
    for row in rows:
        if not isinstance(row, Mapping) or set(row) != {"window", "scale"}:
            raise ValueError(f"schedule: {row!r}: a step has a window and a scale")
        window, scale = row["window"], row["scale"]
        if not isinstance(window, int) or isinstance(window, bool) or window < 1:
            raise ValueError(f"schedule: window = {window!r}: use whole tokens, at least 1")
        if not isinstance(scale, int | float) or isinstance(scale, bool) or not math.isfinite(scale) or scale < 1:
            raise ValueError(f"schedule: scale = {scale!r}: a scale is a finite ratio of at least 1")
        if steps and window <= steps[-1].window:
            raise ValueError(f"schedule: window = {window} after {steps[-1].window}: windows rise from step to step")
        steps.append(Step(window, float(scale)))
    return tuple(steps)


def ladder(max_scale: float) -> list[float]:
    """Powers of two below `max_scale`, then `max_scale`: few values, so that requests share batches and caches."""
    _check_max_scale(max_scale)
    steps = [float(2**k) for k in range(math.ceil(math.log2(max_scale)) if max_scale > 1 else 0)]
    return [*steps, float(max_scale)]


def _check_max_scale(max_scale: float) -> None:
    if not math.isfinite(max_scale) or max_scale < 1:
        raise ValueError(f"max_scale = {max_scale!r}: a scale is a finite ratio of at least 1")


def choose_scale(
    num_tokens: int,
    native_window: int,
    *,
    max_scale: float = 1.0,
    policy: Policy = "ladder",
    schedule: Schedule = (),
) -> ScaleChoice:
    """Smallest adequate scale for `num_tokens` (prompt + new tokens), by E2-LLM Sect. 3.3's g = length / L.

    ladder: smallest of 1, 2, 4, ..., max_scale whose window holds the tokens; above max_scale further powers of two.
    With a `schedule` its first step that holds the tokens comes before the ladder's.
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
        calibrated = next((step for step in schedule if step.window >= num_tokens), None)
        if calibrated is not None:
            return _checked(ScaleChoice(calibrated.scale, calibrated.window), num_tokens, native_window, max_scale)
        steps = ladder(max_scale)
        scale = next((s for s in steps if s >= needed), 0.0) or float(2 ** math.ceil(math.log2(needed)))
    else:
        raise ValueError(f"policy = {policy!r}: choose 'ladder' or 'exact'")
    # The scale is adequate, but floor(scale * L) can fall one short of num_tokens by rounding: 4.35 * 100 is 434.99...
    window = max(int(scale * native_window), num_tokens)
    return _checked(ScaleChoice(scale, window), num_tokens, native_window, max_scale)


def _checked(choice: ScaleChoice, num_tokens: int, native_window: int, max_scale: float) -> ScaleChoice:
    """The choice, with a warning where it lies outside what training drew."""
    if choice.scale <= max_scale and num_tokens <= max_scale * native_window:
        return choice
    warning = (
        f"scale {choice.scale:g} for {num_tokens} tokens is above {max_scale:g}, the largest that training drew: "
        f"quality beyond {int(max_scale * native_window)} tokens was never trained"
    )
    if choice.scale <= max_scale:
        warning = (
            f"{num_tokens} tokens at scale {choice.scale:g}: quality beyond {int(max_scale * native_window)} tokens "
            "was never trained"
        )
    return ScaleChoice(choice.scale, choice.window, warning)


def window_of(scale: float, native_window: int, schedule: Schedule = ()) -> int:
    """Tokens that `scale` is made for: floor(scale * L), or the schedule's window where that is longer."""
    return max([int(native_window * scale), *(step.window for step in schedule if step.scale == scale)])


def steps_of(native_window: int, max_scale: float, schedule: Schedule = ()) -> tuple[Step, ...]:
    """The windows that `choose_scale` tells apart by the ladder, each with its scale: the schedule's, then the ladder's
    that reach further."""
    reached = schedule[-1].window if schedule else 0
    rungs = [Step(int(native_window * scale), scale) for scale in ladder(max_scale)]
    return (*schedule, *(rung for rung in rungs if rung.window > reached))
