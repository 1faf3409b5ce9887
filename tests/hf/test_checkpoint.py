"""e2llm.json: what is written is what is read, and what cannot be read says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from e2llm.hf import CheckpointInfo, current_versions
from e2llm.hf.checkpoint import FILE_NAME

INFO = CheckpointInfo(
    method="yarn",
    native_window=512,
    training_window=256,
    max_scale=16.0,
    placement={"kind": "jumps", "leading_tokens": 4},
    scales={"distribution": "log_uniform", "max_scale": 16.0},
    schedule=[{"window": 512, "scale": 1.0}, {"window": 4096, "scale": 6.0}],
    attention={"training_slope": 0.0, "slope": 0.04},
    base_model="some/base",
    checkpoint="recommended",
    seed=3,
    steps=100,
    tokens=25_600,
    data=[{"path": "text", "documents": 3}],
    versions={"torch": "2.9"},
)


def test_round_trip(tmp_path: Path) -> None:
    path = INFO.save(tmp_path)
    assert path == tmp_path / "e2llm.json" and CheckpointInfo.load(tmp_path) == INFO
    assert [p.name for p in tmp_path.iterdir()] == ["e2llm.json"], "no temporary file stays"
    raw = json.loads(path.read_text())
    assert raw["schema"] == 1 and raw["native_window"] == 512 and raw["placement"]["kind"] == "jumps"


def test_no_file_is_none(tmp_path: Path) -> None:
    assert CheckpointInfo.load(tmp_path) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not an e2llm.json"),
        ("[]", "not an e2llm.json"),
        ("{}", "not an e2llm.json .*schema"),
        ('{"schema": 2}', "schema 2, this version reads 1; update e2llm"),
        ('{"schema": 1, "method": "yarn"}', r"missing \['max_scale', 'native_window', 'training_window'\]"),
        (
            '{"schema": 1, "method": "yarn", "native_window": 1, "training_window": 1, "max_scale": 1, "g": 2}',
            r"unknown \['g'\]",
        ),
        (
            '{"schema": 1, "method": "yarn", "native_window": 1, "training_window": 1, "max_scale": 1,'
            ' "attention": {"slope": 7}}',
            r"attention = .*attention\.slope = 7: use a number between 0 and 1",
        ),
        (
            '{"schema": 1, "method": "yarn", "native_window": 1, "training_window": 1, "max_scale": 1,'
            ' "schedule": [{"window": 9, "scale": 0}]}',
            "schedule: scale = 0",
        ),
        (
            '{"schema": 1, "method": "yarn", "native_window": 1, "training_window": 1, "max_scale": 1,'
            ' "attention": {"tilt": 1}}',
            "attention = .*tilt",
        ),
    ],
)
def test_errors_name_the_file(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / FILE_NAME).write_text(text)
    with pytest.raises(ValueError, match=rf"{FILE_NAME}.*{message}"):
        CheckpointInfo.load(tmp_path)


def test_values_are_checked(tmp_path: Path) -> None:
    INFO.save(tmp_path)
    raw = json.loads((tmp_path / FILE_NAME).read_text()) | {"native_window": "x", "method": 3}
    (tmp_path / FILE_NAME).write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=FILE_NAME):
        CheckpointInfo.load(tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("native_window", "x", "native_window = 'x': expected int, got str"),
        ("native_window", 512.5, r"native_window = 512\.5: expected int"),
        ("seed", True, "seed = True: expected int, got bool"),
        ("method", 3, "method = 3: expected str"),
        ("method", "pi", "method = 'pi': this version knows none, linear"),
        ("max_scale", None, "max_scale = None: expected float"),
        ("max_scale", 0.5, r"max_scale = 0\.5: a scale is"),
        ("training_window", 0, "training_window = 0: must be at least 1"),
        ("placement", [], "placement = .*: expected dict"),
        ("data", {}, "data = .*: expected list"),
    ],
)
def test_errors_name_the_field(tmp_path: Path, field: str, value: object, message: str) -> None:
    path = INFO.save(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(ValueError, match=rf"{FILE_NAME}: {message}"):
        CheckpointInfo.load(tmp_path)


def test_a_whole_number_is_a_scale(tmp_path: Path) -> None:
    path = INFO.save(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_scale": 16}))
    assert CheckpointInfo.load(tmp_path) == INFO


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    INFO.save(tmp_path)
    before = (tmp_path / FILE_NAME).read_text()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        CheckpointInfo(method="none", native_window=1, training_window=1, max_scale=1.0).save(tmp_path)
    assert (tmp_path / FILE_NAME).read_text() == before


def test_versions_of_what_trained_it() -> None:
    import torch

    import e2llm

    found = current_versions("torch", "numpy")
    assert found["e2llm"] == e2llm.__version__ and found["torch"] == torch.__version__
    assert set(found) == {"e2llm", "torch", "numpy"} or set(found) == {"e2llm", "python", "torch", "numpy"}
