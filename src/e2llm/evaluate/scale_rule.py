"""Which scale is taken for a window, and what must still be asked to know: keys decide first, then perplexity.

Flows in: rows of a calibration (perplexity at every scale, pass keys where some were asked). Flows out: the scale, or
the next one to ask at. Knows no model; every answer depends on the rows alone.

Positions in training reach at most scale * L. A scale below window / L leaves the beginning of the window farther from
its end than anything that training drew. What stands there is lost, and perplexity, for which that part hardly counts,
is better; pass keys, the easiest question there is, may still be found there where others are not. So a scale that
covers the window is taken where it finds keys, unless a smaller one finds clearly more of them all over the text.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Rows = Sequence[Mapping[str, Any]]

KEYS_FOR_ONE = 12
"""A smaller scale must find more keys than the reference by more than one of every 12 that are asked.

SmolLM2-135M finds all pass keys at the scale that covers 64k or 128k, and 11 of 12 in the first eighth at 7/8 of it,
which that scale does not reach; of `uuid_kv` it finds 3 of 10 there. By a key or two no scale is better, therefore."""


def rounded(scale: float) -> float:
    """Three digits, so that scales print as what they are."""
    return float(f"{scale:.3g}")


def next_scale(rows: Rows, window: int, native_window: int) -> float | None:
    """Where keys must still be asked to know the best scale; None when it is known.

    First the scales that cover the window, by perplexity, until one has found every key: others could not find more.
    Where they found some, and so few that another could find clearly more, the smaller ones too.
    """
    seen = _seen(rows, window)
    covering = _by_perplexity(seen, _covering(seen.nats, window, native_window))
    for scale in covering:
        if scale not in seen.keys:
            return scale
        if seen.keys[scale].right == seen.keys[scale].asked:
            break
    found = seen.keys[_reference(seen, window, native_window)]
    if not found.right or found.clearly_more > found.asked:
        return None
    smaller = _by_perplexity(seen, [scale for scale in seen.nats if scale not in covering])
    return next((scale for scale in smaller if scale not in seen.keys), None)


def best_scale(rows: Rows, window: int, native_window: int) -> float:
    """The reference, unless a scale below window / L found clearly more keys; of those the one that found the most.

    The reference finds the most keys among the scales that cover the window (scale * native_window >= window; the
    largest one where none does). Clearly more: by more than one of `KEYS_FOR_ONE`. Of several that found as many the
    one with the fewest nats over all corpora, the smaller one where these are equal too. Where no keys were asked or
    the reference finds none, the fewest nats of all decide.
    """
    seen = _seen(rows, window)
    reference = _reference(seen, window, native_window)
    found = seen.keys.get(reference, _Keys(0, 0))
    if not found.right:
        return _by_perplexity(seen, seen.nats)[0]
    more = [scale for scale, keys in seen.keys.items() if keys.right >= found.clearly_more]
    return max(_by_perplexity(seen, more), key=lambda scale: seen.keys[scale].right, default=reference)


@dataclass(frozen=True)
class _Keys:
    """Found, of so many asked."""

    right: int
    asked: int

    @property
    def clearly_more(self) -> int:
        """Keys that another scale must find, of as many."""
        return self.right + self.asked // KEYS_FOR_ONE + 1


@dataclass
class _Seen:
    """What the rows of one window say, by scale."""

    nats: dict[float, float] = field(default_factory=lambda: defaultdict(float))
    keys: dict[float, _Keys] = field(default_factory=dict)


def _seen(rows: Rows, window: int) -> _Seen:
    seen = _Seen()
    for row in rows:
        if row["window"] == window and row["metric"] == "perplexity":
            seen.nats[row["scale"]] += math.log(row["value"]) * row["n"]
        elif row["window"] == window and row["metric"] == "retrieval" and "depth" not in row:
            seen.keys[row["scale"]] = _Keys(round(row["value"] * row["n"]), row["n"])
    return seen


def _covering(scales: Sequence[float] | Mapping[float, Any], window: int, native_window: int) -> list[float]:
    """Scales at which no position of the window lies beyond what training drew; the largest one where none does."""
    return [scale for scale in scales if scale >= rounded(window / native_window)] or [max(scales)]


def _by_perplexity(seen: _Seen, scales: Sequence[float] | Mapping[float, Any]) -> list[float]:
    return sorted(scales, key=lambda scale: (seen.nats[scale], scale))


def _reference(seen: _Seen, window: int, native_window: int) -> float:
    covering = _by_perplexity(seen, _covering(seen.nats, window, native_window))
    return max(covering, key=lambda scale: seen.keys[scale].right if scale in seen.keys else 0)
