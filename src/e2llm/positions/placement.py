"""Where the tokens of a training window stand inside the target window.

Flows in: a seed and a sample index. Flows out: `Placement`, the sample's scale and its tokens' positions, strictly
increasing integers in [0, W). The positions go to the rotary module only; the model itself is given 0, 1, 2, ...
(other ids would be taken for packed documents). The draw depends on (seed, sample index) alone, so any rank, worker
count or resume makes the same one. No torch.

R = training window, L = native window, W = floor(reach * g * L) the target window (the paper: reach = 1; at g = 1 it is
L), S = max(0, W - R) the largest offset.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from e2llm.positions.far import FarKeys, far_keys
from e2llm.positions.scales import ScalesConfig, draw_scale

Kind = Literal["none", "paper", "jumps", "pose", "randpos", "end_anchor"]
NativeKind = Literal["same", "none", "paper", "jumps", "pose", "randpos", "end_anchor"]

MOST_SEGMENTS = 64
"""With `far_weight`: each is a channel more of queries and keys."""


@dataclass(frozen=True, kw_only=True)
class PlacementConfig:
    """Rule by which offsets are drawn."""

    kind: Kind = "jumps"
    """none, paper, jumps, pose, randpos or end_anchor."""
    native_kind: NativeKind = "same"
    """The rule of samples at scale 1: same (as kind) or one of the kinds. With none they train as plain fine-tuning
    does: the model knows that window already, and every jump takes a near token away."""
    leading_tokens: int = 4
    """Tokens at the start that keep offset 0 (the attention sinks; 4 in the paper). For paper and jumps."""
    min_jumps: int = 1
    """For jumps: fewest jumps in a window."""
    max_jumps: int = 3
    """For jumps: most jumps in a window, or as many as a short one has room for; their number is uniform between the
    two."""
    chunks: int = 2
    """For pose: contiguous chunks a window is cut in."""
    end_tokens: int = 18
    """For end_anchor: tokens that stand at the end of the target window."""
    reach: float = 1.0
    """The target window as a multiple of g * L, at scales above 1. Above 1 a window is learned at a smaller scale than
    window / L, which keeps more resolution between near tokens."""
    far_weight: float = 0.0
    """How much a key of an earlier segment counts while training: as (positions before the segment / tokens before it)
    to this power. 0: once, as in the paper; 1: as all the keys that a served window holds in its place
    (`positions.far`). For placements of at most 64 segments."""

    def __post_init__(self) -> None:
        if self.kind not in PLACEMENTS:
            raise ValueError(f"placement.kind = {self.kind!r}: choose one of {', '.join(PLACEMENTS)}")
        if self.native_kind not in (*PLACEMENTS, "same"):
            choices = ", ".join(("same", *PLACEMENTS))
            raise ValueError(f"placement.native_kind = {self.native_kind!r}: choose one of {choices}")
        if self.leading_tokens < 0:
            raise ValueError(f"placement.leading_tokens = {self.leading_tokens}: use 0 or more")
        if not 0 <= self.min_jumps <= self.max_jumps:
            raise ValueError(
                f"placement.min_jumps = {self.min_jumps}: must lie between 0 and max_jumps = {self.max_jumps}"
            )
        if self.chunks < 1:
            raise ValueError(f"placement.chunks = {self.chunks}: use 1 or more")
        if self.end_tokens < 1:
            raise ValueError(f"placement.end_tokens = {self.end_tokens}: use 1 or more")
        if not 1 <= self.reach <= 4:
            raise ValueError(f"placement.reach = {self.reach!r}: use 1 (the target window is g * L) to 4")
        if not 0 <= self.far_weight <= 2:
            raise ValueError(f"placement.far_weight = {self.far_weight!r}: use 0 (every key counts once) to 2")
        if self.far_weight and self.most_segments > MOST_SEGMENTS:
            raise ValueError(
                f"placement.far_weight = {self.far_weight:g}: needs a placement of at most {MOST_SEGMENTS} segments, "
                f"{' and '.join(map(repr, self.kinds))} can make {self.most_segments}; use fewer jumps, or "
                "far_weight = 0"
            )

    def target_window(self, scale: float, native_window: int) -> int:
        """W in tokens at scale g, before any training window that is longer."""
        return int(scale * native_window * (self.reach if scale > 1 else 1.0))

    def kind_at(self, scale: float) -> Kind:
        """The rule of a sample at `scale`."""
        return self.kind if scale > 1 or self.native_kind == "same" else self.native_kind

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The rules in use, that of scales above 1 first."""
        return tuple(dict.fromkeys((self.kind, self.kind_at(1.0))))

    @property
    def most_segments(self) -> float:
        """Segments that a window can fall into."""
        counts = {"none": 1, "paper": 2, "jumps": self.max_jumps + 1, "pose": self.chunks, "end_anchor": 2}
        return max(counts.get(kind, float("inf")) for kind in self.kinds)

    @property
    def sinks(self) -> int:
        """Leading tokens that this placement keeps in their places."""
        return self.leading_tokens if set(self.kinds) & {"paper", "jumps"} else 0

    @property
    def shortest_window(self) -> int:
        """Tokens that this placement needs at least."""
        needed = {
            "paper": self.leading_tokens + 1,
            "jumps": self.leading_tokens + self.min_jumps + 1,
            "pose": self.chunks,
            "end_anchor": self.end_tokens + 1,
        }
        return max(needed.get(kind, 1) for kind in self.kinds)

    def check_window(self, window: int, name: str = "data.window") -> None:
        """Raise ValueError when a window of `window` tokens, called `name`, is too short for this placement."""
        needed = self.shortest_window
        if window < needed:
            named = " and ".join(map(repr, self.kinds))
            raise ValueError(f"{name} = {window}: placement {named} as set needs at least {needed} tokens")


@dataclass(frozen=True)
class Placement:
    """One sample's draw."""

    scale: float
    """g, ratio >= 1."""
    positions: np.ndarray
    """(R,) int64, strictly increasing, in [0, max(R, W))."""
    far: FarKeys | None = None
    """What scores with far keys get on top; None where every key counts once."""


Rule = Callable[[np.random.Generator, int, int, PlacementConfig], np.ndarray]


def _none(rng: np.random.Generator, window: int, target: int, config: PlacementConfig) -> np.ndarray:
    return np.arange(window, dtype=np.int64)


def _paper(rng: np.random.Generator, window: int, target: int, config: PlacementConfig) -> np.ndarray:
    """E2-LLM Eq. 7 and Alg. 1: one offset t ~ U{0..S} for all but the leading tokens."""
    positions = np.arange(window, dtype=np.int64)
    positions[config.leading_tokens :] += rng.integers(0, target - window + 1)
    return positions


def _jumps(rng: np.random.Generator, window: int, target: int, config: PlacementConfig) -> np.ndarray:
    """Several offsets: n cuts at distinct places after the leading tokens, the first segment unshifted, the others'
    offsets sorted draws from {0..S}, so ordinary tokens meet at every distance below g*L and not only the sinks."""
    most = min(config.max_jumps, window - config.leading_tokens - 1)
    num_jumps = int(rng.integers(config.min_jumps, most + 1))
    positions = np.arange(window, dtype=np.int64)
    # A cut at k starts a segment with token k. leading_tokens + 1 is the earliest: the first segment is never empty.
    cuts = np.sort(rng.choice(np.arange(config.leading_tokens + 1, window), size=num_jumps, replace=False))
    offsets = np.sort(rng.integers(0, target - window + 1, size=num_jumps))
    for cut, step in zip(cuts, np.diff(offsets, prepend=0), strict=True):
        positions[cut:] += step
    return positions


def _pose(rng: np.random.Generator, window: int, target: int, config: PlacementConfig) -> np.ndarray:
    """PoSE, Zhu et al. 2023 (arXiv 2309.10400) Sect. 3.2: contiguous chunks of random length, chunk i skips by
    u_i ~ U{u_(i-1)..S}, u_0 = 0. Deviation: the text is one contiguous window (the paper's content offsets v_i pick
    other places of a long document; windows here are short)."""
    positions = np.arange(window, dtype=np.int64)
    cuts = np.sort(rng.choice(np.arange(1, window), size=config.chunks - 1, replace=False))
    skip = 0
    for cut in cuts:
        following = int(rng.integers(skip, target - window + 1))
        positions[cut:] += following - skip
        skip = following
    return positions


def _randpos(rng: np.random.Generator, window: int, target: int, config: PlacementConfig) -> np.ndarray:
    """Randomized positions, Ruoss et al. 2023 (arXiv 2305.16843) Sect. 3: R of the W positions, sorted."""
    return np.sort(rng.choice(target, size=window, replace=False)).astype(np.int64)


def _end_anchor(rng: np.random.Generator, window: int, target: int, config: PlacementConfig) -> np.ndarray:
    """EndPrompt (arXiv 2605.14589): the text stays whole, its last tokens stand at the end of the target window."""
    positions = np.arange(window, dtype=np.int64)
    positions[-config.end_tokens :] += target - window
    return positions


PLACEMENTS: dict[str, Rule] = {
    "none": _none,
    "paper": _paper,
    "jumps": _jumps,
    "pose": _pose,
    "randpos": _randpos,
    "end_anchor": _end_anchor,
}


@dataclass(frozen=True, kw_only=True)
class PositionSampler:
    """Draws the placement of every training sample."""

    native_window: int
    """L in tokens."""
    training_window: int
    """R in tokens."""
    scales: ScalesConfig
    placement: PlacementConfig
    seed: int = 0
    num_samples: int = 0
    """Samples of the whole training, for `scales.final_weights`; 0: not known."""

    def __post_init__(self) -> None:
        for name in ("native_window", "training_window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1 token")
        if self.seed < 0:
            raise ValueError(f"seed = {self.seed}: use 0 or more")
        if self.scales.final_weights and self.num_samples < 1:
            raise ValueError(
                f"scales.final_weights = {self.scales.final_weights!r}: needs to know where training ends, as "
                "`e2llm train` does; elsewhere leave it empty"
            )
        self.placement.check_window(self.training_window)

    def draw(self, sample_index: int, window: int | None = None) -> Placement:
        """Placement of sample `sample_index` (>= 0), from (seed, sample_index) alone.

        `window`: tokens in this sample where it is shorter or longer than the training window. Raises ValueError for
        one that is too short for the placement, and for a negative index.
        """
        if sample_index < 0:
            raise ValueError(f"sample_index = {sample_index}: use 0 or more")
        if window is None:
            window = self.training_window
        else:
            self.placement.check_window(window, "window")
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, sample_index])))
        progress = min(sample_index / self.num_samples, 1.0) if self.num_samples else 0.0
        scale = draw_scale(rng, self.scales, progress)
        # g*L below R leaves no room to shift: the paper is silent there and t_max is taken as 0.
        target = max(self.placement.target_window(scale, self.native_window), window)
        positions = PLACEMENTS[self.placement.kind_at(scale)](rng, window, target, self.placement)
        return Placement(scale, positions, self._far_keys(positions) if self.placement.far_weight else None)

    def _far_keys(self, positions: np.ndarray) -> FarKeys:
        return far_keys(
            positions,
            leading_tokens=self.placement.sinks,
            weight=self.placement.far_weight,
            most_segments=int(self.placement.most_segments),
        )

    def draw_document(self, sample_index: int, length: int) -> Placement:
        """`draw` for a document of `length` tokens; one too short for the placement keeps positions 0, 1, 2, ..."""
        if length >= self.placement.shortest_window:
            return self.draw(sample_index, length)
        config = PlacementConfig(kind="none", far_weight=self.placement.far_weight)
        return dataclasses.replace(self, placement=config).draw(sample_index, length)
