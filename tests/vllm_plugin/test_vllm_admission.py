from __future__ import annotations

from typing import Any

import pytest
from model_configs import scaling

from e2llm.engine.request import RefusedError
from e2llm.infer import plan_request
from e2llm.vllm_plugin.admission import BEYOND_KEY, SCALE_KEY, Wish, admit, cache_salt, read_wish

CALIBRATED = scaling(schedule=[{"window": 100, "scale": 1.0}])


@pytest.mark.parametrize("served", [scaling(), CALIBRATED], ids=["ladder", "schedule"])
@pytest.mark.parametrize(
    ("prompt", "new"), [(10, 20), (60, 5), (80, 20), (100, 400), (500, 12), (30, None), (500, None)]
)
def test_the_scale_is_the_projects_own_choice(served: Any, prompt: int, new: int | None) -> None:
    found = admit(served, prompt, new, Wish(), 512)
    assert found == plan_request(prompt, native_window=64, max_scale=8.0, schedule=served.schedule, max_new_tokens=new)


def test_a_calibrated_scale_is_used_past_its_native_window() -> None:
    assert admit(CALIBRATED, 80, 20, Wish(), 512).scale == 1.0
    assert admit(scaling(), 80, 20, Wish(), 512).scale == 2.0


def test_without_a_limit_1024_new_tokens_and_not_the_largest_window() -> None:
    long = scaling(native_window=4096)
    found = admit(long, 100, None, Wish(), 32768)
    assert (found.scale, found.max_new_tokens) == (1.0, 1024)


def test_a_callers_scale() -> None:
    assert admit(scaling(), 10, 10, Wish(scale=4.0), 512).scale == 4.0
    assert admit(scaling(), 10, None, Wish(scale=2.0), 512).max_new_tokens == 118  # to the end of its window


@pytest.mark.parametrize(
    ("prompt", "new", "wish", "message"),
    [
        (500, 13, Wish(), "largest trained window is 512 tokens"),
        (600, None, Wish(), "largest trained window is 512"),
        (500, 100, Wish(beyond_trained=True), "started for 512 tokens"),
        (10, 10, Wish(scale=3.0), "scale = 3: this engine has tables for 1, 2, 4, 8"),
        (10, 10, Wish(scale=16.0), "scale = 16"),
        (100, 100, Wish(scale=2.0), "the window of scale 2 is 128 tokens"),
    ],
)
def test_refusals(prompt: int, new: int | None, wish: Wish, message: str) -> None:
    with pytest.raises(RefusedError, match=message):
        admit(scaling(), prompt, new, wish, 512)


def test_a_smaller_limit_of_vllm_holds() -> None:
    with pytest.raises(RefusedError, match="started for 200 tokens"):
        admit(scaling(), 190, 20, Wish(), 200)


def test_beyond_the_trained_window_where_the_operator_and_the_caller_want_it() -> None:
    wide = scaling(settings={"max_window": 1024})
    with pytest.raises(RefusedError, match="set beyond_trained"):
        admit(wide, 600, 100, Wish(), 1024)
    found = admit(wide, 600, 100, Wish(beyond_trained=True), 1024)
    assert found.scale == 16.0 and "never trained" in found.warnings[0]


@pytest.mark.parametrize(("prompt", "new"), [(0, 5), (5, 0)])
def test_no_sense(prompt: int, new: int) -> None:
    with pytest.raises(ValueError, match=r"empty|max_new_tokens = 0"):
        admit(scaling(), prompt, new, Wish(), 512)


def test_wishes() -> None:
    assert read_wish(None) == read_wish({"other": 1}) == Wish()
    assert read_wish({SCALE_KEY: 2, BEYOND_KEY: 1}) == Wish(2.0, True)
    for wrong in ({SCALE_KEY: "2"}, {SCALE_KEY: True}, {BEYOND_KEY: "yes"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            read_wish(wrong)


def test_salts_keep_scales_and_callers_apart() -> None:
    owners = [None, "", "a", "a;b", "b"]
    salts = {cache_salt(scale, own) for scale in (1.0, 2.0, 2.5) for own in owners}
    assert len(salts) == 3 * len(owners) and all(salts)
