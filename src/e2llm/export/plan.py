"""What is exported: one scale, chosen for a window as serving chooses it, and what it makes of the frequencies.

Flows in: a loaded model with its extension, a window or a scale. Flows out: an `ExportPlan`. Knows no file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from e2llm.hf.rotary import find_rotary_owner
from e2llm.infer import Engine
from e2llm.positions.attention import YARN_SLOPE
from e2llm.positions.choose import choose_scale, ladder, window_of
from e2llm.positions.frequencies import Frequencies, frequencies
from e2llm.positions.rope import Rope


@dataclass(frozen=True, kw_only=True)
class ExportPlan:
    """Everything that the frequencies of an export follow from."""

    method: str
    """Frequency method, a key of `positions.frequencies.METHODS`."""
    scale: float
    """g, ratio >= 1."""
    window: int
    """Tokens that the export is to be served with."""
    scale_window: int
    """Tokens that the scale is made for, by the checkpoint's schedule; at least `window`."""
    native_window: int
    """L in tokens."""
    slope: float | None
    """Of the attention scale when serving; None: the method's own."""
    ropes: dict[str | None, Rope]
    """Rotary embedding of each layer type that is scaled, as pretrained; {None: rope} where there is one."""
    notes: tuple[str, ...] = ()
    """What whoever exports should know."""
    neighbours: int = 0
    """Method self_extend, of an export with open scales: tokens that keep their distance; else 0."""
    open_scales: tuple[float, ...] = ()
    """Scales that the runtime is to choose from for every request: an export of the unscaled weights, whose own `scale`
    is 1. Empty: one fixed scale."""

    def frequencies(self) -> dict[str | None, Frequencies]:
        """What the engine serves each layer type with at this scale."""
        return {t: frequencies(rope, self.method, self.scale, self.slope) for t, rope in self.ropes.items()}

    def attention_scale_is_own(self) -> bool:
        """Whether the attention scale is what every runtime makes of the method by itself."""
        own = YARN_SLOPE if self.method == "yarn" else 0.0
        return self.scale == 1 or self.slope is None or self.slope == own


def make_open_plan(engine: Engine) -> ExportPlan:
    """The weights as they are, for a runtime that chooses a scale for every request (`e2llm serve --engine
    llamacpp`): whoever reads them without us has the native window."""
    extension = engine.extension
    schedule = extension.schedule
    scales = {*(step.scale for step in schedule), *ladder(engine.max_scale)}
    rotary: Any = find_rotary_owner(engine.model).rotary_emb
    return ExportPlan(
        method=extension.method,
        scale=1.0,
        window=engine.native_window,
        scale_window=engine.native_window,
        native_window=engine.native_window,
        slope=extension.attention.serving(),
        ropes=dict(rotary.ropes),
        neighbours=extension.neighbours,
        open_scales=tuple(sorted(scales)),
    )


def make_plan(engine: Engine, *, window: int | None, scale: float | None) -> ExportPlan:
    """Scale for `window` as serving chooses it for so many tokens, or the scale that is asked for.

    Raises ValueError where neither is given, and for a window that the scale cannot hold.
    """
    if window is None and scale is None:
        raise ValueError(
            "window: say which window to export for (--window 32k), or which scale (--scale 4); only --to gguf can "
            "leave it open"
        )
    if window is not None and window < 1:
        raise ValueError(f"window = {window}: use at least 1 token")
    native, largest, extension = engine.native_window, engine.max_scale, engine.extension
    notes: list[str] = []
    if scale is None:
        assert window is not None
        choice = choose_scale(window, native, max_scale=largest, policy=engine.policy, schedule=extension.schedule)
        scale, scale_window = choice.scale, choice.window
        notes += [choice.warning] if choice.warning else []
    elif not (math.isfinite(scale) and scale >= 1):
        raise ValueError(f"scale = {scale}: use a finite number of at least 1, or leave it out and give a window")
    else:
        scale_window = window_of(scale, native, extension.schedule)
        if window is not None and window > scale_window:
            raise ValueError(
                f"window = {window}: scale {scale:g} holds {scale_window} tokens of the native window {native}; "
                f"use --scale {math.ceil(window / native)}, or leave it out"
            )
        if scale > largest:
            notes.append(f"scale {scale:g} lies outside the trained range (1 to {largest:g})")
    if extension.method == "self_extend" and scale > 1:
        raise ValueError(
            f"scale = {scale:g}: method self_extend reads far tokens by an attention that no other runtime has; serve "
            "with `e2llm serve`, over llama.cpp and vLLM too, or `e2llm generate`, export --scale 1, the native "
            "window, or train the recipe recommended-yarn for other runtimes"
        )
    rotary: Any = find_rotary_owner(engine.model).rotary_emb
    return ExportPlan(
        method=extension.method,
        scale=float(scale),
        window=window or scale_window,
        scale_window=scale_window,
        native_window=native,
        slope=extension.attention.serving(),
        ropes=dict(rotary.ropes),
        notes=tuple(notes),
    )
