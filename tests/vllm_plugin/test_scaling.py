from __future__ import annotations

import json

import pytest
from model_configs import scaling

from e2llm.positions.choose import Step
from e2llm.vllm_plugin.scaling import Scaling, make_scaling


def test_ladder_and_rows() -> None:
    found = scaling()
    assert found.scales == (1.0, 2.0, 4.0, 8.0)
    assert found.row_starts == {1.0: 0, 2.0: 64, 4.0: 192, 8.0: 448}
    assert found.num_rows == 960 and found.max_window == found.trained_window == 512


def test_a_calibrated_schedule_lengthens_the_table_of_its_scale() -> None:
    found = scaling(schedule=[{"window": 200, "scale": 2}, {"window": 512, "scale": 6.0}])
    assert found.schedule == (Step(200, 2.0), Step(512, 6.0))
    assert found.scales == (1.0, 2.0, 4.0, 6.0, 8.0)
    assert found.rows(2.0) == 200 and found.rows(6.0) == 512 and found.rows(4.0) == 256


def test_a_window_beyond_the_trained_one_adds_powers_of_two() -> None:
    found = scaling(settings={"max_window": 1500}, max_scale=6.0)
    assert found.scales == (1.0, 2.0, 4.0, 6.0, 8.0, 16.0, 32.0)
    assert found.max_window == 1500 and found.trained_window == 384


def test_rows_are_rounded_up() -> None:
    assert scaling(max_scale=4.35, native_window=100).rows(4.35) == 435  # 4.35 * 100 is 434.99...


def test_without_e2llm_json_the_model_is_served_at_scale_1() -> None:
    found = make_scaling(None, 128, {})
    assert (found.method, found.native_window, found.scales, found.trained_window) == ("yarn", 128, (1.0,), 128)


def test_a_group_follows_from_the_scale() -> None:
    found = scaling("self_extend", neighbours=22)
    assert [found.group(scale) for scale in found.scales] == [1, 3, 6, 12]  # (64 - 22) * 12 + 22 holds 512
    assert Scaling.from_json(json.loads(json.dumps(found.to_json()))) == found and found.neighbours == 22
    assert [scaling().group(scale) for scale in (1.0, 8.0)] == [1, 1]
    with pytest.raises(ValueError, match=r"method = 'self_extend'.*stands in a checkpoint's e2llm\.json"):
        make_scaling(None, 64, {"method": "self_extend"})


def test_travels_as_json() -> None:
    found = scaling(
        "yarn",
        attention={"training_slope": 0.0, "slope": 0.04},
        schedule=[{"window": 90, "scale": 1.0}],
        settings={"scales": [3], "allow_untested": True},
    )
    assert found.slope == 0.04 and 3.0 in found.scales and found.allow_untested
    again = Scaling.from_json(json.loads(json.dumps(found.to_json())))
    assert again == found and hash(again) == hash(found)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 3}, "e2llm.window: no such setting"),
        ({"max_window": 100}, "max_window = 100: the checkpoint was trained to 512"),
        ({"max_window": 0}, "max_window = 0: use whole tokens"),
        ({"max_window": True}, "max_window = True"),
        ({"scales": [0.5]}, "scales: 0.5: a scale is a finite ratio"),
        ({"scales": ["2"]}, "scales: '2'"),
        ({"scales": 2}, "scales = 2: use a list"),
        ({"allow_untested": "yes"}, "allow_untested = 'yes': use a bool"),
        ({"method": "yarn"}, "method = 'yarn': the checkpoint's is 'linear'"),
    ],
)
def test_settings_that_cannot_be(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scaling(settings=settings)
