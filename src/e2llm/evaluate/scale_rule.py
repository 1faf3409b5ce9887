"""Which scale is taken for a window, and what must still be asked to know: keys decide first, then perplexity.

Flows in: rows of a calibration (perplexity at every scale, pass keys where some were asked). Flows out: the scale, or
the next question. Knows no model; every answer depends on the rows alone.

Positions in training reach at most scale * L. A scale below window / L leaves the beginning of the window farther from
its end than anything that training drew, and what stands there may be lost, while perplexity, for which that part
hardly counts, is better. So half of the keys are asked there (`key_parts`).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from e2llm.evaluate.config import WHOLE_TEXT, depths_label

Rows = Sequence[Mapping[str, Any]]
Depths = tuple[float, float]

KEYS_FOR_ONE = 12
"""Keys asked for each one that a scale may find fewer than the reference; of fewer than 12 none.

A scale as good as the reference misses one key in fifty by luck. One that reached 7/8 of a window still found 0.71 to
0.77 of the keys beyond its reach (SmolLM2-135M at 64k and 128k), so a lost key or two tell them apart. Of 12 keys with
one forgiven the good scale is refused in 2 % of cases, the bad one taken in 14 %; of 24 with two, in 1 % and 3 %. Of 5
with one forgiven the bad scale would be taken in 61 % of cases, with none in 22 %. A good scale that is refused costs
half a percent of perplexity, a bad one that is taken every fourth fact of the window's beginning."""


@dataclass(frozen=True)
class Question:
    """Keys of one part of the text at one scale."""

    scale: float
    depths: Depths


def rounded(scale: float) -> float:
    """Three digits, so that scales print as what they are."""
    return float(f"{scale:.3g}")


def key_parts(scales: Sequence[float], window: int, native_window: int, prompts: int) -> dict[Depths, int]:
    """Parts of the text that keys are asked in -> how many of `prompts`, the part that decides most first.

    Half of them stand where no scale reaches that does not cover the window: in the first 1 - r of the text, r the
    largest of those scales over window / L. A still smaller scale leaves that part out too. The other half stand
    anywhere, as all do where every scale covers the window.
    """
    covering = _covering(scales, window, native_window)
    least = max((scale for scale in scales if scale not in covering), default=None)
    if least is None:
        return {WHOLE_TEXT: prompts}
    far = (0.0, round(1 - least * native_window / window, 6))
    return {far: prompts - prompts // 2, WHOLE_TEXT: prompts // 2}


def next_question(rows: Rows, window: int, native_window: int, parts: Sequence[Depths]) -> Question | None:
    """What must still be asked to know the best scale; None when it is known.

    First the scales that cover the window, by perplexity, until one has found every key: others could not find more.
    Then, by perplexity, those that could be taken instead of the best of these, part after part, until one has found
    enough, as that one itself has.
    """
    seen = _seen(rows, window)
    for scale in _by_perplexity(seen, _covering(seen.nats, window, native_window)):
        for depths in parts:
            if depths_label(depths) not in seen.keys[scale]:
                return Question(scale, depths)
        if all(right == n for right, n in seen.keys[scale].values()):
            break
    reference = _reference(seen, window, native_window)
    for scale in _by_perplexity(seen, seen.nats):
        for depths in parts:
            part = depths_label(depths)
            least = _least(seen.keys[reference][part])
            if least > 0 and part not in seen.keys[scale]:
                return Question(scale, depths)
            if least > 0 and seen.keys[scale][part][0] < least:
                break
        else:
            return None
    raise AssertionError("the reference finds as many as itself")


def best_scale(rows: Rows, window: int, native_window: int) -> float:
    """The scale with the fewest nats over all corpora, among those that find enough keys where keys were asked; the
    smaller one where two are equal.

    Enough: in each part of the text as many as the reference, but for one of `KEYS_FOR_ONE`. The reference is the scale
    that finds the most keys among those that cover the window (scale * native_window >= window; the largest one where
    none does); of several the one with the fewest nats. Where it finds none, perplexity alone decides. A scale that was
    not asked for keys that the reference found is not taken.
    """
    seen = _seen(rows, window)
    reference = _reference(seen, window, native_window)

    def is_enough(scale: float) -> bool:
        return all(
            seen.keys[scale].get(part, (0, 0))[0] >= _least(found) for part, found in seen.keys[reference].items()
        )

    return next(scale for scale in _by_perplexity(seen, seen.nats) if is_enough(scale))


@dataclass
class _Seen:
    """What the rows of one window say. `nats`: by scale; `keys`: scale -> part of the text -> (found, asked)."""

    nats: dict[float, float] = field(default_factory=lambda: defaultdict(float))
    keys: dict[float, dict[str, tuple[int, int]]] = field(default_factory=lambda: defaultdict(dict))


def _seen(rows: Rows, window: int) -> _Seen:
    seen = _Seen()
    for row in rows:
        if row["window"] == window and row["metric"] == "perplexity":
            seen.nats[row["scale"]] += math.log(row["value"]) * row["n"]
        elif row["window"] == window and row["metric"] == "retrieval" and "depth" not in row:
            seen.keys[row["scale"]][row.get("depths", "")] = round(row["value"] * row["n"]), row["n"]
    return seen


def _covering(scales: Sequence[float] | Mapping[float, Any], window: int, native_window: int) -> list[float]:
    """Scales at which no position of the window lies beyond what training drew; the largest one where none does."""
    return [scale for scale in scales if scale >= rounded(window / native_window)] or [max(scales)]


def _by_perplexity(seen: _Seen, scales: Sequence[float] | Mapping[float, Any]) -> list[float]:
    return sorted(scales, key=lambda scale: (seen.nats[scale], scale))


def _reference(seen: _Seen, window: int, native_window: int) -> float:
    covering = _by_perplexity(seen, _covering(seen.nats, window, native_window))
    return max(covering, key=lambda scale: sum(right for right, _ in seen.keys[scale].values()))


def _least(found: tuple[int, int]) -> int:
    """Keys that are enough beside a reference that found (so many, of so many)."""
    right, n = found
    return right - n // KEYS_FOR_ONE
