"""Frames: where the keys of a text stand while one position a key is all that an engine knows.

An engine that rotates by positions and nothing else can still read far keys in groups (`positions.groups`): keys that
are far from a query stand at the place of their group, near ones and the query itself are moved back as one, so that
far distances go on where near ones end. Such a frame is exact for one query. One that stands i places before it sees
its last N - i keys at their own distance, where N are the neighbours, and other keys up to one place farther or nearer
than SelfExtend with N - i neighbours does. So the keys are moved from frame to frame as the text is read. Flows in:
places in a text. Flows out: frames, and the moves from one to the next. No torch, no engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Move(NamedTuple):
    """Keys at positions from `first` up to `last`, which is not among them, go on by `by` positions."""

    first: int
    last: int
    by: int


@dataclass(frozen=True)
class Frame:
    """Positions of a text's keys, exact for the query at place `query`; the one of an empty text by itself."""

    query: int = 0
    first_near: int = 0
    """Keys before this place stand at the positions of their groups."""
    back: int = 0
    """Places that other keys, and queries, stand before their own."""


@dataclass(frozen=True)
class Frames:
    """The frames of texts in one group. Raises ValueError for sizes with which positions would not be consecutive."""

    group: int
    """Tokens in one group of far keys, at least 2."""
    neighbours: int
    """Keys nearer than so many tokens stand at their own distance; at least 2."""
    piece: int
    """Most tokens of a prompt that are read in the frame of their last one, below `neighbours`."""
    ahead: int
    """New tokens that are read in the frame of their last one, below `neighbours`."""

    def __post_init__(self) -> None:
        check_movable(self.neighbours)
        for name, value, most in (
            ("piece", self.piece, self.neighbours - 1),
            ("ahead", self.ahead, self.neighbours - 1),
        ):
            if not 1 <= value <= most:
                raise ValueError(f"{name} = {value}: use 1 to neighbours - 1 ({most})")

    def at(self, query: int) -> Frame:
        """The frame that is exact for the token at place `query`."""
        if query < self.neighbours:
            return Frame(query)
        far = query // self.group + self.neighbours - self.neighbours // self.group
        return Frame(query, query - self.neighbours + 1, query - far)

    def position(self, frame: Frame, key: int) -> int:
        """Where the key at place `key` stands."""
        return key // self.group if key < frame.first_near else key - frame.back

    def piece_of(self, start: int, count: int) -> int:
        """Tokens, of `count` that a prompt goes on with at place `start`, that one frame is to read: all where none of
        them has far keys."""
        if start < self.neighbours:
            return min(count, self.neighbours - start)
        return min(count, self.piece)

    def next(self, frame: Frame, start: int, count: int, *, decoding: bool) -> Frame:
        """The frame for `count` tokens at `start`, where the text stands in `frame`. While decoding, frames are taken
        ahead of the token, for each new one costs a pass over the whole cache."""
        last = start + count - 1
        if not decoding:
            return self.at(last)
        if last <= frame.query:
            return frame
        if last < self.neighbours:  # none of its keys is far: nor should one be, of a query that comes before far ones
            return self.at(min(last + self.ahead - 1, self.neighbours - 1))
        return self.at(last + self.ahead - 1)

    def moves(self, old: Frame, new: Frame, keys: int) -> list[Move]:
        """What takes a text of `keys` keys from `old` to `new`, a later one, in this order.

        A key's position in its group is never above the one that it leaves, so that with the first one first nothing is
        moved onto what has yet to be moved.
        """
        found, first = [], old.first_near
        end = min(new.first_near, keys)
        while first < end:
            # The last key of a group and the first of the next go the same way.
            last = min(first + 2 if (first + 1) % self.group == 0 else first + 1, end)
            found.append(Move(first - old.back, last - old.back, first // self.group - first + old.back))
            first = last
        if first < keys and new.back != old.back:
            found.append(Move(first - old.back, keys - old.back, old.back - new.back))
        return [move for move in found if move.by]


def check_movable(neighbours: int) -> None:
    """Raise ValueError for neighbours with which a text's next position would not be one after its last."""
    if neighbours < 2:
        raise ValueError(
            f"neighbours = {neighbours}: an engine that moves keys needs at least 2; serve with --engine e2llm"
        )


def usual_frames(group: int, neighbours: int) -> Frames:
    """Pieces of a quarter of the neighbours, so that every token of a prompt sees three quarters of them, and answers
    in frames of a sixteenth."""
    return Frames(group, neighbours, max(1, neighbours // 4), max(1, neighbours // 16))
