"""Who of those that wait gets memory next: first come, first served, but a shorter request may pass a longer one that
waits for memory, a bounded number of times.

Flows in: requests in the order of their arrival, pages. Flows out: those admitted now, their pages taken. No tensors.

Nobody starves: once `MOST_PASSED` requests have gone past one that waits, nobody behind it is admitted before it is.
Those that run end after finitely many tokens and give their pages back, and no request that needs more pages than there
are is ever taken.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from e2llm.engine.pages import Pages
from e2llm.engine.running import Running

MOST_PASSED = 64
"""Requests that may go past one that waits for memory."""


def admit(
    waiting: deque[Running], pages: Pages, places: int, *, share: bool, scales: Sequence[float] = ()
) -> list[Running]:
    """Take up to `places` requests out of `waiting` for which there are pages; `share`: also those of the prefix cache,
    `scales`: also those of other scales among them, to be turned.

    Each counts as having passed those before it that stay.
    """
    admitted: list[Running] = []
    staying: list[Running] = []
    while waiting and len(admitted) < places:
        row = waiting.popleft()
        if row.admit(pages, share, [scale for scale in scales if scale != row.scale]):
            admitted.append(row)
            for other in staying:
                other.passed += 1
        else:
            staying.append(row)
        if any(other.passed >= MOST_PASSED for other in staying):
            break
    waiting.extendleft(reversed(staying))
    return admitted
