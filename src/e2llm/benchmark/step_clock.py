"""Seconds a step, without slowing the steps.

Flows in: a call at the end of every step. Flows out: seconds a step, one figure for each block of steps. On a GPU the
steps leave CUDA events in the queue and nobody waits until all are measured: a clock that synchronised each step
would measure the waiting. On a CPU it is the wall clock.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import TrainerCallback


class Measured(Exception):
    """Raised when all steps are measured: nothing of the run is kept, so nothing is saved."""


class StepClock:
    """Marks the ends of steps: `warmup` of them are not counted, then `steps` are."""

    def __init__(self, *, warmup: int, steps: int) -> None:
        self.warmup, self.steps = warmup, steps
        self.taken = 0
        self.warm_after: float | None = None
        """Seconds from the making of this clock to the end of the warm-up: start-up and compilation."""
        self._marks: list[Any] = []
        self._made_at = time.perf_counter()
        self._on_gpu = torch.cuda.is_available()

    def step_ended(self) -> bool:
        """True once all steps are marked."""
        self.taken += 1
        if self.warmup <= self.taken <= self.warmup + self.steps:
            self._marks.append(self._mark())
            if self.warm_after is None:
                self.warm_after = time.perf_counter() - self._made_at
        return self.taken >= self.warmup + self.steps

    def _mark(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> list[float]:
        """Seconds of each counted step. Waits for the device."""
        if not self._on_gpu:
            return [after - before for before, after in zip(self._marks, self._marks[1:], strict=False)]
        torch.cuda.synchronize()
        pairs = zip(self._marks, self._marks[1:], strict=False)
        return [before.elapsed_time(after) / 1000 for before, after in pairs]


class ClockCallback(TrainerCallback):
    """The clock in transformers' Trainer. With a profiler, `profiled` more steps run under it, after those counted."""

    def __init__(self, clock: StepClock, profiler: Any = None, profiled: int = 0) -> None:
        self.clock, self.profiler, self.profiled = clock, profiler, profiled

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Mark; start and stop the profiler; end the run."""
        if not self.clock.step_ended():
            return
        beyond = self.clock.taken - self.clock.warmup - self.clock.steps
        if self.profiler is None or beyond >= self.profiled:
            if self.profiler is not None:
                _synchronize()
                self.profiler.stop()
            raise Measured
        if beyond == 0:
            _synchronize()
            self.profiler.start()


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
