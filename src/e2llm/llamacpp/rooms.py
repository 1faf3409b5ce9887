"""Which scales have a llama.cpp context, how large, and which idle one makes room. Numbers alone: no llama.cpp.

Flows in: what a request needs, the contexts there are. Flows out: a `Decision`. All sizes are cells: key-value slots,
one a token. Rooms are kept in the order of their use, the least recently used first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

CELLS = 256
"""A context's size is a multiple of this (llama.cpp pads it)."""


@dataclass(frozen=True)
class Room:
    """One context."""

    scale: float
    size: int
    used: int
    """Cells promised to running requests; 0 is idle."""
    requests: int = 0


@dataclass(frozen=True)
class Decision:
    """What to do for a request: drop contexts, open one of `open_size` cells (0: the one there is has room)."""

    drop: tuple[float, ...] = ()
    open_size: int = 0


def padded(cells: int) -> int:
    """The size of a context that holds `cells`."""
    return -(-cells // CELLS) * CELLS


def decide(
    rooms: Sequence[Room], scale: float, needed: int, *, total: int, usual: int, most_requests: int
) -> Decision | None:
    """Room for `needed` cells at `scale`; None while running requests hold what it takes.

    A new context has `usual` cells, or `needed` if that is more, or what is left if that is less; all together never
    exceed `total`. A context that runs is never replaced: who does not fit waits until it is idle.
    """
    own = next((room for room in rooms if room.scale == scale), None)
    if own is not None and own.size - own.used >= needed and own.requests < most_requests:
        return Decision()
    if own is not None and own.used:
        return None
    busy = sum(room.size for room in rooms if room.used)
    size = min(padded(max(needed, usual)), (total - busy) // CELLS * CELLS)
    if size < needed:
        return None
    drop = [] if own is None else [scale]
    held = sum(room.size for room in rooms) - (0 if own is None else own.size)
    for room in rooms:
        if held + size <= total:
            break
        if not room.used and room.scale != scale:
            drop.append(room.scale)
            held -= room.size
    return Decision(tuple(drop), size)
