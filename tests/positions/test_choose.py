"""The scale of a request, at every boundary."""

from __future__ import annotations

import math

import pytest

from e2llm.positions.choose import DEFAULT_NEW_TOKENS, Step, choose_scale, ladder, parse_schedule, steps_of, window_of

L = 4096


@pytest.mark.parametrize(
    ("max_scale", "steps"),
    [
        (1, [1]),
        (1.5, [1, 1.5]),
        (2, [1, 2]),
        (16, [1, 2, 4, 8, 16]),
        (20, [1, 2, 4, 8, 16, 20]),
        (2.7, [1, 2, 2.7]),
    ],
)
def test_ladder(max_scale: float, steps: list[float]) -> None:
    assert ladder(max_scale) == steps


@pytest.mark.parametrize(
    ("tokens", "scale"),
    [(1, 1), (L, 1), (L + 1, 2), (2 * L, 2), (2 * L + 1, 4), (16 * L, 16), (16 * L + 1, 20), (20 * L, 20)],
)
def test_smallest_adequate_step(tokens: int, scale: float) -> None:
    choice = choose_scale(tokens, L, max_scale=20)
    assert (choice.scale, choice.window, choice.warning) == (scale, scale * L, None)


@pytest.mark.parametrize(("tokens", "scale"), [(20 * L + 1, 32), (32 * L, 32), (32 * L + 1, 64), (200 * L, 256)])
def test_beyond_what_training_drew(tokens: int, scale: float) -> None:
    choice = choose_scale(tokens, L, max_scale=20)
    assert (choice.scale, choice.window) == (scale, scale * L)
    assert choice.warning and f"scale {scale}" in choice.warning and f"{tokens} tokens" in choice.warning
    assert "above 20" in choice.warning and str(20 * L) in choice.warning


def test_a_model_never_extended_warns_beyond_its_window() -> None:
    assert choose_scale(L, L).warning is None
    choice = choose_scale(L + 1, L)
    assert choice.scale == 2 and choice.warning is not None


@pytest.mark.parametrize(
    ("tokens", "scale", "warns"),
    [
        (1, 1.0, False),
        (L, 1.0, False),
        (L + 1, (L + 1) / L, False),
        (6000, 6000 / L, False),
        (20 * L, 20.0, False),
        (20 * L + 1, (20 * L + 1) / L, True),
    ],
)
def test_exact(tokens: int, scale: float, warns: bool) -> None:
    choice = choose_scale(tokens, L, max_scale=20, policy="exact")
    assert choice.scale == scale
    assert choice.window == max(L, tokens)
    assert (choice.warning is not None) == warns


@pytest.mark.parametrize("policy", ["ladder", "exact"])
@pytest.mark.parametrize("native", [1, 100, 512, 3000, 4095])
def test_the_window_holds_the_request(policy: str, native: int) -> None:
    previous = 1.0
    for tokens in range(1, 30 * native, max(1, native // 37)):
        choice = choose_scale(tokens, native, max_scale=12, policy=policy)
        assert choice.window >= tokens
        assert choice.scale >= max(previous, tokens / native), "adequate, and never less for a longer request"
        assert policy == "exact" or choice.scale < 2 * max(1.0, tokens / native), "and not larger than needed"
        previous = choice.scale


def test_the_window_holds_the_request_at_a_scale_that_rounds_down() -> None:
    assert choose_scale(435, 100, max_scale=4.35).window >= 435


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_tokens": 0}, "num_tokens = 0"),
        ({"native_window": 0}, "native_window = 0"),
        ({"policy": "nearest"}, "policy = 'nearest': choose 'ladder' or 'exact'"),
        ({"max_scale": 0.5}, r"max_scale = 0\.5"),
        ({"max_scale": 0.5, "policy": "exact"}, r"max_scale = 0\.5"),
        ({"max_scale": math.nan}, "max_scale = nan"),
        ({"max_scale": math.inf}, "max_scale = inf"),
        ({"max_scale": math.inf, "policy": "exact"}, "max_scale = inf"),
    ],
)
def test_errors(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_scale(**{"num_tokens": 10, "native_window": L, "max_scale": 4, **arguments})


def test_default_new_tokens() -> None:
    """A request that names no limit never gets the largest window: 1024 new tokens (the issue's figure)."""
    assert DEFAULT_NEW_TOKENS == 1024


SCHEDULE = (Step(L, 1.0), Step(4 * L, 2.5), Step(16 * L, 12.0))


@pytest.mark.parametrize(
    ("tokens", "scale", "window"),
    [(1, 1, L), (L, 1, L), (L + 1, 2.5, 4 * L), (4 * L, 2.5, 4 * L), (4 * L + 1, 12, 16 * L), (16 * L + 1, 20, 20 * L)],
)
def test_a_schedule_comes_before_the_ladder(tokens: int, scale: float, window: int) -> None:
    choice = choose_scale(tokens, L, max_scale=20, schedule=SCHEDULE)
    assert (choice.scale, choice.window, choice.warning) == (scale, window, None)


def test_a_schedule_beyond_what_training_drew_warns() -> None:
    choice = choose_scale(16 * L, L, max_scale=8, schedule=SCHEDULE)
    assert choice.scale == 12 and "above 8" in choice.warning
    choice = choose_scale(16 * L, L, max_scale=14, schedule=SCHEDULE)
    assert choice.scale == 12 and f"beyond {14 * L} tokens was never trained" in choice.warning
    assert choose_scale(8 * L, L, max_scale=20, schedule=SCHEDULE, policy="exact").scale == 8, "asked for, not chosen"


def test_the_window_of_a_scale() -> None:
    assert window_of(12.0, L, SCHEDULE) == 16 * L and window_of(12.0, L) == 12 * L
    assert window_of(1.0, L, SCHEDULE) == L and window_of(7.0, L, SCHEDULE) == 7 * L
    assert window_of(2.5, 2 * L, (Step(L, 2.5),)) == 5 * L, "never less than scale * L"


def test_schedules_are_read_back_and_checked() -> None:
    assert parse_schedule([{"window": s.window, "scale": s.scale} for s in SCHEDULE]) == SCHEDULE
    assert parse_schedule([]) == ()
    for rows, message in [
        ([{"window": 5}], ".*a step has a window and a scale"),
        ([{"window": 0, "scale": 1}], "window = 0"),
        ([{"window": 1.5, "scale": 1}], r"window = 1\.5"),
        ([{"window": True, "scale": 1}], "window = True"),
        ([{"window": 5, "scale": 0.5}], r"scale = 0\.5"),
        ([{"window": 5, "scale": math.inf}], "scale = inf"),
        ([{"window": 5, "scale": 1}, {"window": 5, "scale": 2}], "window = 5 after 5: windows rise"),
        ([3], "3: a step has"),
    ]:
        with pytest.raises(ValueError, match=f"schedule: {message}"):
            parse_schedule(rows)


def test_the_steps_are_those_that_requests_meet() -> None:
    schedule = (Step(64, 1.0), Step(200, 2.0), Step(256, 3.0))
    for given in ((), schedule):
        steps = steps_of(64, 6.0, given)
        assert steps[: len(given)] == given
        for tokens in range(1, 6 * 64 + 1):
            choice = choose_scale(tokens, 64, max_scale=6.0, schedule=given)
            step = next(step for step in steps if step.window >= tokens)
            assert (choice.window, choice.scale) == (step.window, step.scale)
    assert [step.window for step in steps_of(64, 6.0)] == [64, 128, 256, 384]
    assert [(step.window, step.scale) for step in steps_of(64, 6.0, schedule)[3:]] == [(384, 6.0)]
