"""The caller's end of a running request: a queue of `Output`s, and a way to stop. No torch."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator

from e2llm.engine.request import Admission, Output


class QueueStream:
    """Iterates over a request's outputs; the engine's thread fills it."""

    def __init__(self, admission: Admission, wake: Callable[[], None]) -> None:
        self.admission = admission
        self.made_at = 0.0
        """time.perf_counter() at which the engine made the last output that was read, however late that was."""
        self._queue: queue.SimpleQueue[tuple[float, Output]] = queue.SimpleQueue()
        self._wake = wake
        self._cancelled = threading.Event()
        self._ended = False

    def __iter__(self) -> Iterator[Output]:
        return self

    def __next__(self) -> Output:
        if self._ended:
            raise StopIteration
        self.made_at, output = self._queue.get()
        self._ended = output.finish_reason is not None
        return output

    @property
    def cancelled(self) -> bool:
        """Whether the caller wants no more."""
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """Stop; memory is freed before the next step. Any thread, any time, more than once."""
        if not self._cancelled.is_set():
            self._cancelled.set()
            self._wake()

    def put(self, output: Output) -> None:
        """The engine's side."""
        self._queue.put((time.perf_counter(), output))
