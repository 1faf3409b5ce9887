"""Several processes, one evaluation: each measures its own documents or prompts, all get every result.

Flows in: the launcher's environment (torchrun, accelerate launch). Flows out: `Ranks`, with this process's share of a
list and the whole list of results in its order. A document or prompt is measured by one process, in the way that a
single one would, and sums are made afterwards in the list's order: they are the same to the last bit. With one process
nothing is imported and nothing is sent. Knows no model.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

Item = TypeVar("Item")
Found = TypeVar("Found")

_PATIENCE = timedelta(days=1)
"""Processes wait for each other where a part ends; one that died is noticed by the launcher, not by this."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of the evaluation. Whatever is written or shown, the first one does."""

    index: int = 0
    count: int = 1
    device: str | None = None
    """Where several run: the device of this one, e.g. cuda:1."""

    @property
    def is_first(self) -> bool:
        return self.index == 0

    def own(self, items: Sequence[Item]) -> list[Item]:
        """This process's share: every count-th item."""
        return list(items[self.index :: self.count])

    def gather(self, own: Sequence[Found]) -> list[Found]:
        """One result for each item of every process's share -> those of all, in the items' order. All must call it."""
        if self.count == 1:
            return list(own)
        from accelerate.utils import gather_object

        shares = gather_object([list(own)])
        found: list[Any] = [None] * sum(map(len, shares))
        for index, share in enumerate(shares):
            found[index :: self.count] = share
        return found

    def share(self, items: Sequence[Item], work: Callable[[list[Item]], Sequence[Found]]) -> list[Found]:
        """`work` (items -> one result each) on this process's share; the results of all items. All must call it."""
        own = self.own(items)
        return self.gather(work(own) if own else [])

    def from_first(self, value: Found) -> Found:
        """The first process's value. All must call it."""
        if self.count == 1:
            return value
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]  # type: ignore[no-any-return]

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()


def launched(device: str | None = None) -> Ranks:
    """The processes that a launcher started; one alone without it. `device` is what the user asked for.

    ValueError for a device by number where several processes run: each has its own.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return Ranks()
    if device not in (None, "cpu", "cuda"):
        raise ValueError(f"device = {device!r}: {count} processes run and each takes its own device; leave it out")
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu", timeout=_PATIENCE)
    return Ranks(state.process_index, state.num_processes, str(state.device))


def leave() -> None:
    """At the end of a process: the group of processes is dissolved, where there is one."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        PartialState().destroy_process_group()
