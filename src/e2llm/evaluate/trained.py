"""Which windows and scales a checkpoint was trained for: others are measured where they are asked for, and marked.

Flows in: an engine, windows, scales. Flows out: a refusal before anything runs, or the label of a row. A model without
an e2llm.json was trained for no range by us, and SelfExtend reads longer windows of weights that were trained for
something else: both are baselines.
"""

from __future__ import annotations

from collections.abc import Sequence

from e2llm.infer import Engine

BEYOND = "beyond_trained"
"""Label of rows outside the range, true there; other rows do not have it."""


def largest_window(engine: Engine) -> int:
    """Tokens of the largest window that the engine's method and training hold; unscaled weights hold their native
    one."""
    none = engine.extension.method == "none"
    return engine.native_window if none else int(engine.native_window * engine.max_scale)


def has_range(engine: Engine) -> bool:
    """Whether the engine's model is a checkpoint with a trained range."""
    borrowed = engine.info is not None and engine.extension.method == "self_extend" != engine.info.method
    return engine.info is not None and not borrowed


def check_windows_trained(engine: Engine, windows: Sequence[int]) -> None:
    """ValueError for a window above the trained range and the calibrated windows, where no scale is named: a number
    there should be asked for on purpose, as a calibration does."""
    largest = max([largest_window(engine), *(step.window for step in engine.extension.schedule)])
    if has_range(engine) and max(windows) > largest:
        raise ValueError(
            f"windows = {sorted(windows)}: {max(windows)} is above the checkpoint's trained range ({largest} tokens); "
            "lower windows, or name scales (--scales) to measure it all the same"
        )


def beyond_trained(engine: Engine, window: int, scale: float | None) -> dict[str, bool]:
    """The label of rows measured outside the trained range; {} inside. scale None: chosen for each request."""
    outside = window > largest_window(engine) or (scale or 1.0) > engine.max_scale
    return {BEYOND: True} if has_range(engine) and outside else {}
