"""A progress bar on stderr, or nothing where it would only fill a log."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

Advance = Callable[[float, int], None]
"""advance(size, tokens): so much of the source was read, so many tokens came of it."""


@contextmanager
def progress_bar(label: str, total: float | None, *, enabled: bool) -> Iterator[Advance]:
    """Show `label`, the share of `total` done, tokens and tokens/s while the block runs. total None: length unknown."""
    console = Console(stderr=True)
    shown = enabled and console.is_terminal and not console.is_dumb_terminal
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[tokens]:,} tokens"),
        TextColumn("{task.fields[rate]:,.0f}/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not shown, transient=True) as bar:
        task = bar.add_task(label, total=total, tokens=0, rate=0.0)
        tokens_done = 0

        def advance(size: float, tokens: int) -> None:
            nonlocal tokens_done
            tokens_done += tokens
            elapsed = bar.tasks[0].elapsed or 0.0
            bar.update(task, advance=size, tokens=tokens_done, rate=tokens_done / elapsed if elapsed else 0.0)

        yield advance
