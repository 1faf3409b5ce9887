"""Chosen against fixed scales: every method and scale, each row once, the chosen one marked."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from architectures import WINDOW, tiny_model
from texts import character_tokenizer

from e2llm.evaluate.choice import choice
from e2llm.evaluate.config import EvaluateConfig
from e2llm.evaluate.suites import NAMES, with_suite
from e2llm.hf import CheckpointInfo, save_model
from e2llm.records import Record


def test_rows_of_both_methods(tmp_path: Path) -> None:
    info = CheckpointInfo(
        method="yarn", native_window=WINDOW, training_window=WINDOW, max_scale=8.0, base_model="tiny", checkpoint="ours"
    )
    folder = save_model(tiny_model("llama"), character_tokenizer(), tmp_path / "model", info)
    text = tmp_path / "a.txt"
    text.write_text("".join(random.Random(0).choices("abcdefgh ", k=700)))
    out = tmp_path / "choice.json"
    config = EvaluateConfig(
        model=str(folder),
        corpora={"noise": str(text)},
        windows=(64, 128),
        scales=(2.0, 4.0),
        protocols=("whole",),
        device="cpu",
        out=str(out),
    )
    choice(config, progress=False)
    rows = Record.load(out).rows
    found = {(r["method"], r["window"], r["choice"], r["scale"]) for r in rows}
    assert found == {
        (method, window, *which)
        for method in ("linear", "yarn")
        for window in (64, 128)
        for which in (("fixed", 2.0), ("fixed", 4.0), ("chosen", float(window // 64)))
    }
    assert len(rows) == 12
    same = {r["choice"]: r["value"] for r in rows if r["method"] == "yarn" and r["window"] == 128 and r["scale"] == 2.0}
    assert same["chosen"] == same["fixed"]
    assert len({r["n"] for r in rows}) == 1  # the same tokens at every window


def test_suites_never_change_what_is_given() -> None:
    assert "choice" in NAMES
    given = with_suite("ruler", {"prompts": 7, "qa": {"qa_2": "x.json"}})
    assert given["prompts"] == 7 and "qa_2" in given["protocols"] and "qa_1" not in given["protocols"]
    assert given["left_out"] == ("qa_1",) and with_suite("smoke", {})["left_out"] == ()
    assert with_suite("paper", {})["max_strides"] == 64
    assert with_suite("smoke", {"windows": (512,)})["windows"] == (512,)
    for name in set(NAMES) - {"choice"}:
        EvaluateConfig(model="x", **with_suite(name, {}))
    with pytest.raises(ValueError, match="suite = 'rular'"):
        with_suite("rular", {})
