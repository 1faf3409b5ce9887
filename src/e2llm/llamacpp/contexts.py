"""llama.cpp contexts by scale, inside a budget of key-value slots: opened when first needed, dropped when idle and
another scale needs the memory, the least recently used first.

Flows in: admitted requests (`Running`). Flows out: `Seat`s, a context and a sequence in it. One thread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from e2llm.engine.running import Running
from e2llm.llamacpp.library import Context
from e2llm.llamacpp.rooms import Room, decide
from e2llm.positions.frames import Frame

_log = logging.getLogger(__name__)

SHARES = 4
"""A context takes this part of the memory, so that as many scales are at hand at once, unless a request needs more."""


@dataclass
class Held:
    """One context and who sits in it."""

    context: Context
    seats: dict[Running, int] = field(default_factory=dict)
    """Request -> sequence."""
    frames: dict[Running, Frame] = field(default_factory=dict)
    """Where the keys of requests stand that are moved."""
    free: list[int] = field(default_factory=list)
    used: int = 0
    """Cells promised to the requests."""


class Contexts:
    """`total`: cells of all contexts together. `make`: (scale, cells) -> a context."""

    def __init__(self, total: int, most_requests: int, make: Callable[[float, int], Context]) -> None:
        self.total, self.most_requests = total, most_requests
        self._make = make
        self._held: dict[float, Held] = {}
        """By scale, the least recently used first."""

    @property
    def used(self) -> int:
        """Cells promised to running requests."""
        return sum(held.used for held in self._held.values())

    @property
    def sizes(self) -> dict[float, int]:
        """Scale -> cells of its context."""
        return {scale: held.context.size for scale, held in self._held.items()}

    def admit(self, row: Running) -> bool:
        """A seat for the request, all cells that it will ever need included; False while there is none."""
        decision = decide(
            [Room(scale, h.context.size, h.used, len(h.seats)) for scale, h in self._held.items()],
            row.scale,
            row.pages_needed,
            total=self.total,
            usual=self.total // SHARES,
            most_requests=self.most_requests,
        )
        if decision is None:
            return False
        for scale in decision.drop:
            self._held.pop(scale).context.close()
            _log.info("context of scale %g dropped", scale)
        if decision.open_size:
            context = self._make(row.scale, decision.open_size)
            self._held[row.scale] = Held(context, free=list(range(self.most_requests)))
            _log.info("context of scale %g opened, %d tokens", row.scale, context.size)
        held = self._held.pop(row.scale)
        self._held[row.scale] = held  # the most recently used stands last
        held.seats[row] = held.free.pop(0)
        held.used += row.pages_needed
        return True

    def rows(self) -> list[tuple[Held, list[Running]]]:
        """Contexts at work with their requests, oldest first."""
        return [(held, list(held.seats)) for held in self._held.values() if held.seats]

    def leave(self, row: Running) -> None:
        """Free what the request holds; none for one that has no seat."""
        held = self._held.get(row.scale)
        if held is None or row not in held.seats:
            return
        sequence = held.seats.pop(row)
        held.frames.pop(row, None)
        held.context.forget(sequence)
        held.free.insert(0, sequence)
        held.used -= row.pages_needed

    def close(self) -> None:
        for held in self._held.values():
            held.context.close()
        self._held.clear()
