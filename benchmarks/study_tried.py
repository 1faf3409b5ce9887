"""What a run of a study tries that no recipe can say: changes that were asked about and are no part of the package.

Flows in: the keys of a plan's row that name them. Flows out: a corpus and a training with the change in it. What turns
out to help becomes a recipe's setting and leaves this file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from e2llm.data import Corpus
from e2llm.data.order import keyed_hash
from e2llm.data.parts import Part, Window
from e2llm.data.planted import PlantedPart
from e2llm.data.windows import IGNORED
from e2llm.positions import frequencies, placement
from e2llm.positions.placement import Placement, PlacementConfig
from e2llm.train import run as training
from e2llm.train.trainer import PlacingCollator

_COPY = 0x636F7079  # keeps these random numbers apart from others drawn from the same seed


@dataclass(frozen=True)
class Tried:
    """Keys of a plan's row; the values that they have here change nothing."""

    ramp: tuple[float, ...] = ()
    """YaRN's cut-offs (beta_fast, beta_slow), turns in the native window: channels that turn more often keep their
    frequency, those that turn less often are divided by the scale. (): YaRN's own, 32 and 1."""
    copied: float = 0.0
    """Share of windows in which a span of the first half stands once more in the second half."""
    far_loss: bool = False
    """Tokens of a window's first segment carry no loss where something stands farther on: they see nothing far."""
    end_tokens: int = 0
    """For jumps: so many tokens at a window's end stand at the end of the target window, by one jump of those it has
    (an end anchor beside jumps, as EndPrompt's alone is)."""

    def __post_init__(self) -> None:
        if self.ramp and not (len(self.ramp) == 2 and self.ramp[0] > self.ramp[1] > 0):
            raise ValueError(f"ramp = {list(self.ramp)}: two cut-offs in turns, the larger first; YaRN's are [32, 1]")
        if not 0 <= self.copied <= 1:
            raise ValueError(f"copied = {self.copied:g}: use a share of windows from 0 to 1")
        if self.end_tokens < 0:
            raise ValueError(f"end_tokens = {self.end_tokens}: use 0 or more")

    def changed(self) -> dict[str, Any]:
        """What is not as it always is, for Records."""
        usual = dataclasses.asdict(Tried())
        return {key: value for key, value in dataclasses.asdict(self).items() if value != usual[key]}


def read_tried(row: dict[str, Any]) -> Tried:
    """Of a plan's row. Raises ValueError naming the key."""
    kinds = {"ramp": (list,), "copied": (int, float), "far_loss": (bool,), "end_tokens": (int,)}
    for key, kind in kinds.items():
        if key in row and type(row[key]) not in kind:
            raise ValueError(f"{key} = {row[key]!r}: use a value of type {' or '.join(one.__name__ for one in kind)}")
    return Tried(
        ramp=tuple(map(float, row.get("ramp", ()))),
        copied=float(row.get("copied", 0.0)),
        far_loss=row.get("far_loss", False),
        end_tokens=row.get("end_tokens", 0),
    )


@contextlib.contextmanager
def trying(tried: Tried) -> Iterator[None]:
    """Within it models read with YaRN have those cut-offs, a training's first segments carry no loss, its jumps end at
    an anchor."""
    yarn, collator, jumps = frequencies.METHODS["yarn"], training.PlacingCollator, placement.PLACEMENTS["jumps"]
    if tried.ramp:
        fast, slow = tried.ramp
        frequencies.METHODS["yarn"] = functools.partial(frequencies.yarn, beta_fast=fast, beta_slow=slow)
    if tried.far_loss:
        training.PlacingCollator = FarLossCollator  # type: ignore[misc]
    if tried.end_tokens:
        placement.PLACEMENTS["jumps"] = functools.partial(_to_the_end, jumps, tried.end_tokens)
    try:
        yield
    finally:
        frequencies.METHODS["yarn"], training.PlacingCollator = yarn, collator  # type: ignore[misc]
        placement.PLACEMENTS["jumps"] = jumps


def _to_the_end(
    jumps: placement.Rule, tokens: int, rng: np.random.Generator, window: int, target: int, config: PlacementConfig
) -> np.ndarray:
    """Positions (R,) of `jumps` with one jump less, the last `tokens` at the end of the target window."""
    most = config.max_jumps - 1
    positions = jumps(rng, window, target, dataclasses.replace(config, max_jumps=most, min_jumps=min(most, 1)))
    positions[-tokens:] = np.arange(target - tokens, target)
    return positions


class FarLossCollator(PlacingCollator):
    """A `PlacingCollator` that takes the loss from what sees nothing far."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().__call__(rows)
        leading = self.sampler.placement.sinks
        for labels, drawn in zip(batch["labels"], batch["placements"], strict=True):
            labels[: first_far(drawn, leading)] = IGNORED
        return batch


def first_far(drawn: Placement, leading: int) -> int:
    """The first token behind a jump of the text, that from the leading tokens left out; 0 where there is no jump."""
    begins = np.flatnonzero(np.diff(drawn.positions) != 1) + 1
    begins = begins[begins > leading]
    return int(begins[0]) if len(begins) else 0


def with_copies(corpus: Corpus, share: float) -> Corpus:
    """`corpus` with `share` of each part's training windows copying a span of themselves. Raises ValueError where some
    tokens count for more in the loss: they would no longer stand where they did."""
    if not share:
        return corpus
    if any(isinstance(part, PlantedPart) and part.answer_weight != 1 for part in corpus.train):
        raise ValueError(f"copied = {share:g}: not with data.planted_weight, whose tokens copies would move; use 1")
    return dataclasses.replace(corpus, train=tuple(_CopyingPart(part, share) for part in corpus.train))


@dataclass(frozen=True)
class _CopyingPart:
    inner: Part
    share: float

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def weight(self) -> float:
        return self.inner.weight

    def windows(self, window: int) -> _CopyingWindows:
        return _CopyingWindows(self, window)


class _CopyingWindows:
    """Windows of the part, some with a span of a sixteenth to an eighth of them said again."""

    def __init__(self, part: _CopyingPart, window: int) -> None:
        self.share, self.inner = part.share, part.inner.windows(window)
        self.num_unusable = self.inner.num_unusable

    def draw(self, number: int, seed: int, jumps: Any = None) -> Window:
        """The same for the same (number, seed)."""
        found = self.inner.draw(number, seed, jumps)
        key = keyed_hash(_COPY, seed, number)
        if (key >> 11) / 2**53 >= self.share:
            return found
        return copying(found, np.random.default_rng(key))


def copying(window: Window, rng: np.random.Generator) -> Window:
    """`window` (R,) with a span of its first half once more in its second half, in place of what stood there."""
    size, tokens = len(window.tokens), window.tokens.copy()
    length = int(rng.integers(size // 16, size // 8 + 1))
    source = int(rng.integers(0, size // 2 - length + 1))
    target = int(rng.integers(size // 2, size - length + 1))
    tokens[target : target + length] = tokens[source : source + length]
    return dataclasses.replace(window, tokens=tokens)
