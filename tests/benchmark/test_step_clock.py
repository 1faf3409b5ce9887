"""Which steps the clock counts, on a clock that the test sets."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from e2llm.benchmark import step_clock
from e2llm.benchmark.step_clock import ClockCallback, Measured, StepClock


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, in a list of one, on a machine without a GPU."""
    time = [0.0]
    monkeypatch.setattr(step_clock.time, "perf_counter", lambda: time[0])
    monkeypatch.setattr(step_clock.torch.cuda, "is_available", lambda: False)
    return time


def test_steps_after_the_warm_up_are_counted(now: list[float]) -> None:
    clock = StepClock(warmup=2, steps=3)
    ends = []
    for moment in (50.0, 60.0, 61.0, 63.0, 67.0):
        now[0] = moment
        ends.append(clock.step_ended())
    assert ends == [False, False, False, False, True]
    assert clock.seconds() == [1.0, 2.0, 4.0]
    assert clock.warm_after == 60.0


def run(callback: ClockCallback) -> int:
    """Steps until the callback ends the run."""
    for step in range(1, 100):
        try:
            callback.on_step_end(None, None, None)
        except Measured:
            return step
    raise AssertionError("it never ended")


def test_the_run_ends_with_the_last_counted_step(now: list[float]) -> None:
    assert run(ClockCallback(StepClock(warmup=2, steps=3))) == 5


def test_profiled_steps_come_after_and_are_not_counted(now: list[float]) -> None:
    calls: list[tuple[str, int]] = []
    clock = StepClock(warmup=1, steps=2)

    def note(what: str) -> Any:
        return lambda: calls.append((what, clock.taken))

    profiler = SimpleNamespace(start=note("start"), stop=note("stop"))
    assert run(ClockCallback(clock, profiler, 4)) == 7
    assert calls == [("start", 3), ("stop", 7)], "four steps between"
    assert len(clock.seconds()) == 2
