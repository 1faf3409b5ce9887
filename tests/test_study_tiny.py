"""The study on the embedded model: its plan's defaults and budget, the quickstart's text, an end by a signal."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from interrupts import listen_to_interrupts
from scripts_of import load_script
from transformers import AutoTokenizer

from e2llm import quickstart
from e2llm.records import Record

ROOT = Path(__file__).parents[1] / "benchmarks"
PLAN = ROOT / "tiny.toml"


@pytest.fixture(scope="module")
def study() -> Any:
    return load_script(ROOT / "study.py")


@pytest.fixture(scope="module")
def text(study: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return study.open_text("stdlib", tmp_path_factory.mktemp("work"))


def options(**given: Any) -> argparse.Namespace:
    """The command line's, where only `given` was said."""
    names = ("model", "base_model", "text", "windows", "key_windows", "prompts", "tasks", "work")
    return argparse.Namespace(**{**dict.fromkeys(names), "set": [], **given})


def test_a_plan_alone_can_be_run_and_the_command_line_wins(study: Any) -> None:
    defaults = study.read_defaults(PLAN)
    alone = study.with_defaults(options(), defaults)
    assert alone.model == str(quickstart.TINY) and alone.text == "stdlib" and alone.base_model == "tiny-512"
    assert list(alone.windows) == [512, 2048, 8192] and alone.prompts == 50 and alone.work == Path("runs/study-tiny")
    said = {"model": "other", "windows": [64, 128], "prompts": 3, "work": Path("w"), "set": ["train.steps=1"]}
    won = study.with_defaults(options(**said), defaults)
    assert all(getattr(won, key) == value for key, value in said.items() if key != "set")
    assert won.set == [*defaults.set, "train.steps=1"] and won.text == "stdlib"
    with pytest.raises(ValueError, match="give --text"):
        study.with_defaults(options(model="m"), study.read_defaults(ROOT / "study.toml"))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("promts = 3", "unknown keys .'promts'"),
        ('prompts = "3"', "prompts = '3'"),
        ('windows = ["512"]', "windows = "),
        ("set = [1]", "set = "),
        ("model = ", "not valid TOML"),
    ],
)
def test_a_table_that_cannot_be_is_refused(study: Any, tmp_path: Path, table: str, message: str) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text(f"[study]\n{table}\n")
    with pytest.raises(ValueError, match=message):
        study.read_defaults(plan)
    with pytest.raises(ValueError, match="cannot be read"):
        study.read_defaults(tmp_path / "nowhere.toml")


def test_every_run_has_the_quickstarts_budget_and_a_prediction(study: Any, text: Any) -> None:
    settings = [f"model.name={quickstart.TINY}", "train.evaluate_windows=0", *study.read_defaults(PLAN).set]
    runs = {run.name: run for run in study.read_plan(PLAN, text.sources, settings, [])}
    assert len(runs) > 24 and all(run.predicted for run in runs.values())
    own_rate = {"adapters-16", "rate-half", "rate-double"}  # which ask for it
    own = quickstart._plan("tiny", Path("out"), text.files).recipe
    for recipe in (run.recipe for run in runs.values() if run.method is None):
        train, budget = recipe.train, own.train
        assert train.steps == (44 if recipe.name == "facts-none-44" else budget.steps)  # that much text is left of it
        assert (train.learning_rate == budget.learning_rate) == (recipe.name not in own_rate), recipe.name
        tokens = train.batch_size * train.gradient_accumulation * recipe.data.window
        assert tokens == budget.batch_size * budget.gradient_accumulation * own.data.window == 8192
        pieces = 8192 if recipe.data.weighs_tokens else 2048 if train.distill else 0
        assert train.logits_tokens == pieces
    # One run is the quickstart's recipe, but for where its weights are taken; the control differs from it in what the
    # study changed.
    same = study.what_trains(runs["far-100-interpolated"].recipe) | {"data": None, "train": None}
    assert same == study.what_trains(own) | {"data": None, "train": None}
    control = study.what_trains(runs["control"].recipe)
    changed = {key for key in same if same[key] is not None and control[key] != same[key]}
    assert changed == {"placement"}
    assert runs["control"].recipe.data.sources == own.data.sources
    assert [found[0] for found in runs["control"].scales.values()] == [4, 16]
    # What is compared follows each other, so that one training serves all three.
    places = [list(runs).index(f"plain-{method}") for method in ("linear", "ntk", "yarn")]
    assert places == list(range(places[0], places[0] + 3))
    assert len({str(study.what_trains(runs[f"plain-{method}"].recipe)) for method in ("linear", "ntk", "yarn")}) == 1


def test_the_text_is_the_quickstarts(study: Any, text: Any) -> None:
    def shares(planted: float | None) -> list[tuple[str, float]]:
        plan = study.read_plan(PLAN, lambda *_: text.sources(planted, None), [], ["control"])
        return [(Path(source.path).name, source.weight) for source in plan[0].recipe.data.sources]

    assert shares(None) == [("text.jsonl", 0.85), ("facts.jsonl", 0.15)]
    assert shares(0.0) == [("text.jsonl", 1.0)] and shares(0.5) == [("text.jsonl", 0.5), ("facts.jsonl", 0.5)]
    tokenizer = AutoTokenizer.from_pretrained(quickstart.TINY)
    found = text.documents(tokenizer, 8192)
    assert list(found) == ["python"] and len(found["python"]) == 8
    assert found["python"][0].name == "argparse.py" and all(len(d.tokens) >= 8192 for d in found["python"])


def test_both_signals_interrupt_and_are_given_back(study: Any) -> None:
    before = [signal.getsignal(number) for number in study.SIGNALS]
    for number in study.SIGNALS:
        with pytest.raises(KeyboardInterrupt), study.interrupted_by_signals():
            os.kill(os.getpid(), number)
            time.sleep(5)
    assert [signal.getsignal(number) for number in study.SIGNALS] == before


def test_a_signal_ends_it_and_the_same_command_goes_on(tmp_path: Path) -> None:
    for name, count in (("train/a.txt", 3000), ("dev/code/a.txt", 400)):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("def f(x):\n    return x + 1\n" * count)
    plan = tmp_path / "plan.toml"

    def write_plan(steps: int) -> None:
        rows = "".join(f'[[runs]]\nname="{n}"\nset=["train.steps={s}"]\n' for n, s in (("a", 1), ("b", steps)))
        head = f'[study]\nname="s"\nmodel="tiny"\ntext="{tmp_path}"\nbase_model="t"\nwindows=[128, 256]\n'
        head += 'key_windows=[256]\nprompts=1\nset=["data.window=64", "train.batch_size=1", "train.log_every=1", '
        plan.write_text(head + f'"train.workers=0"]\n{rows}')

    command = [sys.executable, str(ROOT / "study.py"), "--plan", str(plan), "--out", str(tmp_path / "out")]
    command += ["--work", str(tmp_path / "work")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    write_plan(100_000)
    process = subprocess.Popen(command, preexec_fn=listen_to_interrupts, **pipes)
    try:
        metrics, end = tmp_path / "work" / "b" / "metrics.jsonl", time.monotonic() + 120
        while not (metrics.is_file() and metrics.read_text()):
            assert process.poll() is None and time.monotonic() < end, process.communicate()
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        out, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, error
    assert "] a: " in out and "stopped: " in error and "Traceback" not in error
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["study_s_a.json"]
    assert Record.load(tmp_path / "out" / "study_s_a.json").config["study"] == "s"
    write_plan(2)
    done = subprocess.run(command, **pipes, timeout=120)
    assert done.returncode == 0 and "a: already measured" in done.stdout, done.stderr
    assert Record.load(tmp_path / "out" / "study_s_b.json").config["recipe"]["train"]["steps"] == 2
