"""Chosen against fixed scales: every method and scale, each row once, the chosen one marked."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from architectures import WINDOW, tiny_model
from harness_tasks import write_tasks
from texts import character_tokenizer

from e2llm.evaluate.choice import choice
from e2llm.evaluate.config import EvaluateConfig
from e2llm.evaluate.suite_config import SuiteConfig
from e2llm.evaluate.suites import NAMES, with_suite
from e2llm.hf import CheckpointInfo, save_model
from e2llm.infer import Engine
from e2llm.records import Record


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    info = CheckpointInfo(
        method="yarn", native_window=WINDOW, training_window=WINDOW, max_scale=8.0, base_model="tiny", checkpoint="ours"
    )
    return save_model(tiny_model("llama"), character_tokenizer(), tmp_path_factory.mktemp("choice") / "model", info)


def test_rows_of_both_methods(folder: Path, tmp_path: Path) -> None:
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


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("default::e2llm.evaluate.task_suites.LeftOutWarning")
def test_short_tasks_at_the_chosen_and_at_fixed_scales(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the command line, without text: every row is that of `--suite short`, and each model is loaded once."""
    pytest.importorskip("lm_eval")
    from e2llm.cli import main
    from e2llm.evaluate.short import run as short

    tasks = tmp_path / "tasks"
    write_tasks(tasks)
    loads: list[str] = []
    load = Engine.load.__func__  # type: ignore[attr-defined]

    def counted(cls: type, path: str, **options: Any) -> Any:
        loads.append(options["method"])
        return load(cls, path, **options)

    monkeypatch.setattr(Engine, "load", classmethod(counted))
    out = tmp_path / "choice.json"
    asked = ["--tasks-folder", str(tasks), "--tasks", "local_choice", "--max-examples", "5", "--scales", "2", "4"]
    assert main(["evaluate", str(folder), "--suite", "choice", *asked, "--device", "cpu", "--out", str(out)]) == 0
    printed = capsys.readouterr()
    told = [line for line in printed.err.splitlines() if "lost their beginning" in line]
    assert len(told) == 2 and all(line.startswith("warning: short: requests longer") for line in told)  # two methods
    assert loads == ["linear", "yarn"] and not list(tmp_path.glob("*.partial*"))
    record = Record.load(out)
    found = {(r["method"], r["choice"], r["scale"], r["harness_metric"]): r for r in record.rows}
    assert set(found) == {
        (method, *which, metric)
        for method in ("linear", "yarn")
        for which in (("chosen", None), ("fixed", 2.0), ("fixed", 4.0))
        for metric in ("acc", "acc_norm")
    }
    assert len(found) == len(record.rows) and all(r["n"] == 5 for r in record.rows)
    own = SuiteConfig(
        suite="short", model=str(folder), method="yarn", tasks_folder=str(tasks), tasks=("local_choice",),
        max_examples=5, scales=(4.0,), device="cpu", out=str(tmp_path / "short.json"),
    )  # fmt: skip
    for row in short(own, progress=False).rows:
        assert found["yarn", "fixed", 4.0, row["harness_metric"]] == row | {"choice": "fixed"}
    assert "local_choice, acc" in printed.out


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_short_tasks_inside_the_native_window_are_chosen_scale_1(tmp_path: Path) -> None:
    """With text beside; the native window holds every request, so the chosen scale is 1 and says so."""
    pytest.importorskip("lm_eval")
    info = CheckpointInfo(
        method="yarn", native_window=512, training_window=512, max_scale=8.0, base_model="tiny", checkpoint="ours"
    )
    model = tiny_model("llama", max_position_embeddings=512)
    folder = save_model(model, character_tokenizer(), tmp_path / "model", info)
    text = tmp_path / "a.txt"
    text.write_text("".join(random.Random(0).choices("abcdefgh ", k=2100)))
    config = EvaluateConfig(
        model=str(folder), corpora={"noise": str(text)}, windows=(512,), scales=(2.0,), protocols=("whole",),
        device="cpu", out=str(tmp_path / "choice.json"),
    )  # fmt: skip
    asked = SuiteConfig(suite="short", model="x", tasks_folder=str(write_tasks(tmp_path / "t")), max_examples=2)
    record = choice(config, short=asked, methods=("yarn",), progress=False)
    rows = [row for row in record.rows if row.get("suite") == "short"]
    assert {(row["choice"], row["scale"]) for row in rows} == {("chosen", 1.0), ("fixed", 2.0)}
    assert {row["task"] for row in rows} == {"local_choice", "local_answer", "local_text"}
    assert [row["metric"] for row in record.rows if "suite" not in row] == ["perplexity", "perplexity"]
    assert set(record.config["short"]["yarn"]) == {"chosen", "fixed"}


def test_what_the_comparison_cannot_take_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    from e2llm.cli import main

    for options, complaint in (
        (["--tasks", "piqa"], "--tasks: name the short tasks' folder, or hub, with --tasks-folder"),
        (["--max-examples", "3"], "--max-examples: name the short tasks' folder"),
        (["--corpus", "a=b", "--method", "self_extend"], "method = 'self_extend': choice compares linear and yarn"),
        (["--tasks-folder", "no/such/folder"], "no such folder of the harness' YAML tasks"),
        ([], "corpora = {}"),
    ):
        assert main(["evaluate", "no/such/model", "--suite", "choice", *options]) == 2
        assert complaint in capsys.readouterr().err
