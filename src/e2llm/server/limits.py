"""Who may run, who waits and who is sent away: places in the engine, and requests a minute.

Flows in: arrivals and departures on one event loop. Flows out: permission, waiting, or how long to stay away.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Callable

_MOST_BUCKETS = 10_000


class FullError(Exception):
    """The queue is full."""


class Gate:
    """Places for sequences, given out in the order of arrival. Not thread-safe: for one event loop."""

    def __init__(self, places: int, queue: int) -> None:
        self.places, self.queue = places, queue
        self.running = 0
        self.waiting = 0
        self._waiters: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def enter(self, count: int) -> None:
        """Take `count` places, or wait for them. Raises FullError. A caller that is cancelled holds nothing."""
        assert 1 <= count <= self.places, "checked before: such a request would wait for ever"
        if not self._waiters and self.running + count <= self.places:
            self.running += count
            return
        if self.waiting + count > self.queue:
            raise FullError
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (count, mine)
        self._waiters.append(entry)
        self.waiting += count
        try:
            await mine
        except asyncio.CancelledError:
            if mine.done() and not mine.cancelled():  # let in and cancelled in the same step
                self.leave(count)
            else:
                self.waiting -= count
                self._waiters.remove(entry)
                self._let_in()
            raise

    def leave(self, count: int) -> None:
        self.running -= count
        self._let_in()

    def _let_in(self) -> None:
        while self._waiters and self.running + self._waiters[0][0] <= self.places:
            count, future = self._waiters.popleft()
            self.waiting -= count
            self.running += count
            future.set_result(None)


class RateLimit:
    """A token bucket for each client: `burst` at once, then `per_minute`. The least recently seen is forgotten first,
    which can only be to its good."""

    def __init__(self, per_minute: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_second, self.burst, self.clock = per_minute / 60, float(burst), clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, client: str, cost: float = 1.0) -> float:
        """0 where the request may pass, else the seconds until it may."""
        now = self.clock()
        level, since = self._buckets.pop(client, (self.burst, now))
        level = min(self.burst, level + (now - since) * self.per_second)
        passes = level >= cost
        self._buckets[client] = (level - cost if passes else level, now)
        if len(self._buckets) > _MOST_BUCKETS:
            self._buckets.popitem(last=False)
        return 0.0 if passes else (cost - level) / self.per_second
