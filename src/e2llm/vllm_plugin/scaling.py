"""What one vLLM engine can do with scales: its method and windows, which scales have tables and where each begins.

Flows in: e2llm.json, settings of the operator. Flows out: `Scaling`, plain numbers that travel to every process of vLLM
inside its model config. No torch, no vLLM.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from e2llm.positions.attention import AttentionConfig
from e2llm.positions.choose import Schedule, ladder, parse_schedule, window_of
from e2llm.positions.groups import group_of_scale

if TYPE_CHECKING:
    from e2llm.hf.checkpoint import CheckpointInfo

DEFAULT_METHOD = "yarn"
"""Of a model without e2llm.json, as everywhere in e2llm."""
_SETTINGS = {"max_window": int, "scales": list, "allow_untested": bool, "method": str}


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """The scales of one engine, fixed when it starts."""

    method: str
    """Frequency method, a key of `positions.frequencies.METHODS`."""
    native_window: int
    """L in tokens."""
    max_scale: float
    """Largest scale that training drew."""
    slope: float | None
    """Attention scale 1 + slope * ln(g) when serving; None: the method's own."""
    schedule: Schedule
    """Calibrated scale for each window; () is the ladder."""
    scales: tuple[float, ...]
    """Scales that have a table, rising; 1 is the first."""
    max_window: int
    """Tokens (prompt + new) of the longest request that the tables hold."""
    allow_untested: bool = False
    """Run on parts of vLLM that this plugin has not been proven on."""
    neighbours: int = 0
    """Method self_extend: tokens that keep their distance. 0 with other methods."""

    @property
    def trained_window(self) -> int:
        """Tokens of the largest window that was trained."""
        return int(self.native_window * self.max_scale)

    def window(self, scale: float) -> int:
        """Tokens that `scale` is made for."""
        return window_of(scale, self.native_window, self.schedule)

    def rows(self, scale: float) -> int:
        """Rows of the scale's table, a position each. Rounded up: the ladder gives a request of 435 tokens scale 4.35
        over a native window of 100."""
        return max(math.ceil(scale * self.native_window), self.window(scale))

    def group(self, scale: float) -> int:
        """Tokens that stand at one place among the far keys of a request at `scale`; 1 with methods without groups."""
        return group_of_scale(scale, self.native_window, self.neighbours) if self.neighbours else 1

    @functools.cached_property
    def row_starts(self) -> dict[float, int]:
        """Where each scale's table begins among all rows."""
        starts, total = {}, 0
        for scale in self.scales:
            starts[scale] = total
            total += self.rows(scale)
        return starts

    @property
    def num_rows(self) -> int:
        """Rows of all tables together."""
        last = self.scales[-1]
        return self.row_starts[last] + self.rows(last)

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` reads them back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Scaling:
        """What `to_json` wrote, lists for tuples or not."""
        return _from_text(json.dumps(raw, sort_keys=True))


@functools.lru_cache(maxsize=8)
def _from_text(text: str) -> Scaling:
    raw = json.loads(text)
    return Scaling(**raw | {"schedule": parse_schedule(raw["schedule"]), "scales": tuple(raw["scales"])})


def make_scaling(info: CheckpointInfo | None, native_window: int, settings: Mapping[str, Any]) -> Scaling:
    """The scales of a checkpoint, or of a model without e2llm.json (`native_window` is then its config's).

    settings: `max_window` (tokens; tables for requests beyond the trained window, which must still ask for it one by
    one), `scales` (more scales that callers may ask for), `allow_untested`, and `method` for a model without
    e2llm.json. Raises ValueError naming the setting that cannot be.
    """
    _check_settings(settings, info)
    if info is None and settings.get("method") == "self_extend":
        raise ValueError(
            "e2llm.method = 'self_extend': how many tokens keep their distance stands in a checkpoint's e2llm.json, "
            "and this model has none; serve it with `e2llm serve`"
        )
    attention = AttentionConfig() if info is None else info.attention_config()
    native = native_window if info is None else info.native_window
    max_scale = 1.0 if info is None else float(info.max_scale)
    schedule = () if info is None else parse_schedule(info.schedule)
    trained = int(native * max_scale)
    reach = settings.get("max_window") or trained
    if reach < trained:
        raise ValueError(
            f"e2llm.max_window = {reach}: the checkpoint was trained to {trained} tokens; to serve less, give vLLM a "
            "smaller max_model_len"
        )
    scales = {*ladder(max_scale), *(step.scale for step in schedule), *map(float, settings.get("scales", ()))}
    if reach > trained:
        above = max_scale
        while int(native * above) < reach:
            above = float(2 ** (math.floor(math.log2(above)) + 1))
            scales.add(above)
    return Scaling(
        method=settings.get("method", DEFAULT_METHOD) if info is None else info.method,
        native_window=native,
        max_scale=max_scale,
        slope=attention.serving(),
        schedule=schedule,
        scales=tuple(sorted(scales)),
        max_window=reach,
        allow_untested=settings.get("allow_untested", False),
        neighbours=0 if info is None else info.neighbours,
    )


def _check_settings(settings: Mapping[str, Any], info: CheckpointInfo | None) -> None:
    if unknown := settings.keys() - _SETTINGS.keys():
        raise ValueError(f"e2llm.{min(unknown)}: no such setting; known are {', '.join(_SETTINGS)}")
    for name, value in settings.items():
        expected = _SETTINGS[name]
        if not isinstance(value, expected):
            raise ValueError(f"e2llm.{name} = {value!r}: use a {expected.__name__}")
    window = settings.get("max_window", 1)
    if isinstance(window, bool) or window < 1:
        raise ValueError(f"e2llm.max_window = {window!r}: use whole tokens, at least 1")
    for scale in settings.get("scales", ()):
        if not isinstance(scale, int | float) or isinstance(scale, bool) or not (math.isfinite(scale) and scale >= 1):
            raise ValueError(f"e2llm.scales: {scale!r}: a scale is a finite ratio of at least 1")
    if info is not None and settings.get("method", info.method) != info.method:
        raise ValueError(f"e2llm.method = {settings['method']!r}: the checkpoint's is {info.method!r}; leave it out")
