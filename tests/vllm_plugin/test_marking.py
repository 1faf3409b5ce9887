from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from model_configs import model_config, scaling

from e2llm.hf.checkpoint import CheckpointInfo
from e2llm.hf.exported import EXPORT_MARK
from e2llm.vllm_plugin.marking import default_max_tokens, mark, scaling_of
from e2llm.vllm_plugin.refusals import ROPE_TYPE


def extended(folder: Path, **fields: Any) -> Path:
    values = {"method": "linear", "native_window": 64, "training_window": 32, "max_scale": 8.0}
    CheckpointInfo(**values | fields).save(folder)
    return folder


def test_a_checkpoint_is_marked_once(tmp_path: Path) -> None:
    config = model_config(extended(tmp_path))
    mark(config)
    once = dict(config.hf_config.rope_parameters)
    assert once["rope_type"] == ROPE_TYPE and scaling_of(config) == scaling()
    mark(config)
    assert config.hf_config.rope_parameters == once


def test_the_checkpoints_own_native_window_counts(tmp_path: Path) -> None:
    config = model_config(extended(tmp_path, native_window=32))
    mark(config)
    found = scaling_of(config)
    assert found is not None and (found.native_window, found.max_window) == (32, 256)
    assert int(64 * config.hf_config.rope_parameters["factor"]) == 256


def test_a_checkpoint_with_groups_is_marked_where_its_layers_allow(tmp_path: Path) -> None:
    folder = extended(tmp_path, method="self_extend", neighbours=22)
    config = model_config(folder, layer_types=["full_attention"])
    mark(config)
    assert scaling_of(config) == scaling("self_extend", neighbours=22)
    with pytest.raises(ValueError, match="sliding_attention"):
        mark(model_config(folder, layer_types=["sliding_attention"]))


@pytest.mark.parametrize("case", ["no e2llm.json", "hub name", "export", "method none"])
def test_everything_else_is_left_alone(case: str, tmp_path: Path) -> None:
    config = model_config("someone/model" if case == "hub name" else tmp_path)
    if case == "export":
        extended(tmp_path)
        setattr(config.hf_config, EXPORT_MARK, {"scale": 4.0, "window": 256})
    elif case == "method none":
        extended(tmp_path, method="none")
    before = dict(vars(config.hf_config))
    mark(config)
    assert vars(config.hf_config) == before and scaling_of(config) is None


def test_an_operator_may_name_a_model_without_e2llm_json(tmp_path: Path) -> None:
    config = model_config(tmp_path, {"e2llm": {"max_window": 256, "method": "linear"}})
    mark(config)
    found = scaling_of(config)
    assert found is not None and found.scales == (1.0, 2.0, 4.0) and found.trained_window == 64


@pytest.mark.parametrize(
    ("overrides", "hf", "message"),
    [
        ({"e2llm": 3}, {}, "hf_overrides.e2llm = 3"),
        ({}, {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "scale them twice"),
        ({}, {"model_type": "gemma3_text"}, "does not let its window be extended"),
        ({"e2llm": {"nonsense": 1}}, {}, "no such setting"),
    ],
)
def test_what_cannot_be_served(overrides: dict, hf: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        mark(model_config(extended(tmp_path), overrides, **hf))


def test_an_export_is_not_scaled_again(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="an export, its config is scaled already"):
        mark(model_config(tmp_path, {"e2llm": {}}, **{EXPORT_MARK: {"scale": 4.0, "window": 256}}))


def test_models_that_read_more_than_text_are_refused(tmp_path: Path) -> None:
    config = model_config(extended(tmp_path))
    config.hf_config.get_text_config = lambda: object()
    with pytest.raises(ValueError, match="text models alone"):
        mark(config)


def test_vllms_own_server_gets_1024_tokens_without_a_limit(tmp_path: Path) -> None:
    config = model_config(extended(tmp_path))
    assert default_max_tokens(config, {"top_p": 0.5}) == {"top_p": 0.5}
    mark(config)
    assert default_max_tokens(config, {"top_p": 0.5}) == {"top_p": 0.5, "max_tokens": 1024}
    assert default_max_tokens(config, {"max_tokens": 7}) == {"max_tokens": 7}
