"""benchmarks/study.py: its plans resolve to equal budgets; one command trains, measures and compares a set."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts_of import load_script

import e2llm
from e2llm.config import load_recipe, shipped_recipes
from e2llm.records import Record

ROOT = Path(__file__).parents[1] / "benchmarks"
TINY = Path(e2llm.__file__).parent / "assets" / "tiny-512"


@pytest.fixture(scope="module")
def study() -> Any:
    return load_script(ROOT / "study.py")


def one_file(study: Any, folder: Path) -> Any:
    """`data.sources` of a folder with one training file."""
    (folder / "train").mkdir()
    (folder / "train" / "a.txt").write_text("text")
    return study.open_text(str(folder), folder).sources


def test_the_baselines_are_every_study_recipe_with_equal_tokens(study: Any, tmp_path: Path) -> None:
    plan = study.read_plan(ROOT / "baselines.toml", one_file(study, tmp_path), ["model.name=x"], [])
    readings = [run for run in plan if run.name.startswith("plain-")]
    timed = [run for run in plan if run.seconds_of]
    full = {f"{method}-{window}" for method in ("pi", "yarn") for window in ("16k", "64k")}
    assert plan[-4:] == timed and all(run.name == f"{run.speed_of}-equal-time" for run in timed)
    assert {run.speed_of: run.seconds_of for run in timed} == dict.fromkeys(full, "recommended")
    assert all(run.predicted for run in plan)
    runs = [run for run in plan if run not in [*readings, *timed]]
    read_by = ["self-extend" if run.self_extend else run.recipe.method for run in readings]
    assert [run.name for run in readings] == [f"plain-{name}" for name in read_by]
    assert read_by == ["linear", "ntk", "yarn", "self-extend"]
    # One training serves all four: nothing that changes a weight differs, and they follow each other.
    places = [plan.index(run) for run in readings]
    assert places == list(range(places[0], places[0] + 4)) and plan[places[0] - 1].name == "plain"
    assert all(study.what_trains(run.recipe) == study.what_trains(runs[0].recipe) for run in readings)
    own = {name for name, path in shipped_recipes().items() if path.parent.name == "study"}
    expected = own | {"paper", "recommended", "recommended-yarn"}
    assert {run.name for run in runs} == expected == {run.recipe.name for run in runs}
    tokens = {run.recipe.train.steps * run.recipe.train.batch_size * run.recipe.data.window for run in runs}
    assert tokens == {39_321_600}
    for run in runs:
        if run.name == "plain":  # read by those after it
            continue
        # First comes one fixed scale where it covers the window, else window / L (8192); then what may read better.
        fixed, largest = run.recipe.scales.distribution == "fixed", run.recipe.scales.max_scale
        first = {w: max(largest if fixed else 1.0, w / 8192) for w in (8192, 16384, 32768, 65536, 131072)}
        assert all(found[0] == first[window] for window, found in run.scales.items())
        assert {32768, 65536, 131072} <= run.scales.keys() and (not fixed or run.scales.keys() == first.keys())
        assert run.name == "drope-like" or all(len(set(run.scales[w])) == 2 for w in (32768, 65536, 131072))


def test_the_studys_plan_resolves(study: Any, tmp_path: Path) -> None:
    sources = one_file(study, tmp_path)
    assert len(study.read_plan(ROOT / "study.toml", sources, ["model.name=x"], [])) > 6
    with pytest.raises(ValueError, match="nobody"):
        study.read_plan(ROOT / "study.toml", sources, [], ["nobody"])


def test_the_second_familys_plan_resolves(study: Any, tmp_path: Path) -> None:
    """Its native window is 32,768, and no window is read outside the scales that were trained."""
    defaults = study.read_defaults(ROOT / "gemma3.toml")
    assert defaults.name == "gemma3" and min(defaults.windows) == 32_768
    plan = study.read_plan(ROOT / "gemma3.toml", one_file(study, tmp_path), ["model.name=x", *defaults.set], [])
    trained = [run for run in plan if run.method is None]
    assert [run.name for run in trained] == ["plain", "paper", "recommended", "recommended-yarn"]
    assert all(run.predicted for run in plan)
    assert {run.recipe.train.steps for run in trained} == {600}
    for run in plan:
        assert all(found[0] == window / 32_768 for window, found in run.scales.items())
        assert run.name in ("plain", "base-none", "base-yarn") or run.recipe.scales.max_scale >= 4


def test_equal_time_makes_the_steps_of_the_measured_speeds(study: Any, tmp_path: Path) -> None:
    plan = tmp_path / "plan.toml"
    timed = 'seconds_of = "short"\nspeed_of = "long"\n'
    plan.write_text(f'[[runs]]\nname = "a"\nrecipe = "yarn-64k"\n{timed}')
    (run,) = study.read_plan(plan, lambda *_: "[]", ["model.name=x"], [])
    with pytest.raises(ValueError, match="that of 'short', which is not measured"):
        study.in_equal_time(run, tmp_path, "")
    for name, steps, seconds, window in (("short", 1200, 150.0, 4096), ("long", 600, 400.0, 65536)):
        train = {"steps": steps, "batch_size": 1, "gradient_accumulation": 1}
        rows = [{"metric": "train_seconds", "value": seconds, "unit": "s", "n": steps}]
        recipe = {"recipe": {"data": {"window": window}, "train": train}}
        Record("study", config=recipe, rows=rows).save(tmp_path / f"study_{name}.json")
    assert study.in_equal_time(run, tmp_path, "").recipe.train.steps == 225  # 150 s of steps of 2/3 s
    (tmp_path / "study_short.json").replace(tmp_path / "study_long.json")
    Record("study", config=recipe, rows=rows).save(tmp_path / "study_short.json")
    with pytest.raises(ValueError, match="of another size"):
        study.in_equal_time(run, tmp_path, "")
    plan.write_text('[[runs]]\nname = "a"\nseconds_of = "b"\n')
    with pytest.raises(ValueError, match="go together"):
        study.read_plan(plan, lambda *_: "[]", ["model.name=x"], [])


def test_the_curves_change_one_thing_a_run(study: Any, tmp_path: Path) -> None:
    plan = study.read_plan(ROOT / "curves.toml", one_file(study, tmp_path), ["model.name=x"], [])
    runs = {run.name: run for run in plan}
    methods = ("none", "linear", "ntk", "yarn", "self-extend")
    assert {n for n, run in runs.items() if run.method} == {f"base-{m}" for m in methods}
    assert all(run.predicted for run in runs.values())
    assert {n for n in runs if n.startswith("paper-max-")} == {f"paper-max-{g}" for g in (4, 8, 16, 32)}
    for name, run in runs.items():
        kind, _, number = name.rpartition("-")
        if kind == "paper-max":
            assert run.recipe.scales.max_scale == float(number)
        elif kind.endswith("-steps"):
            assert run.recipe.train.steps == int(number)
    plan = tmp_path / "plan.toml"
    plan.write_text('[[runs]]\nname = "a"\nmethod = "ntk"\ninterpolations = [0.5]\n')
    with pytest.raises(ValueError, match=r"reads the base untrained: no copied, .*planted_sets, ramp, recipe, set"):
        study.read_plan(plan, lambda *_: "[]", [], [])
    plan.write_text('[[runs]]\nname = "a"\ninterpolations = [-0.5]\n')
    with pytest.raises(ValueError, match=r"interpolations = \[-0\.5\]: use shares"):
        study.read_plan(plan, lambda *_: "[]", ["model.name=x"], [])
    plan.write_text('[[runs]]\nname = "a"\nmethod = "nkt"\n')
    with pytest.raises(ValueError, match="nkt"):
        study.read_plan(plan, lambda *_: "[]", [], [])


def test_one_command_trains_measures_and_compares(
    study: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words, letters = "def return self value import for in while if not none true list".split(), random.Random(0)
    for name, count in (("train/a.txt", 30_000), ("dev/code/a.txt", 4000), ("dev/code/b.txt", 4000)):
        file = tmp_path / "text" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(" ".join(letters.choices(words, k=count)))
    plan = tmp_path / "plan.toml"
    recomputes = 'set = ["train.gradient_checkpointing=true"]'
    rows = {"plain": "", "pi-16k": f"scales = {{1024 = [2]}}\n{recomputes}"}
    rows["recommended"] = "interpolations = [0, 1, 0.8]"
    plan.write_text("".join(f'[[runs]]\nname = "{n}"\nrecipe = "{n}"\n{more}\n' for n, more in rows.items()))
    with plan.open("a") as more:
        more.write('[[runs]]\nname = "base-ntk"\nmethod = "ntk"\n')
    small = ["train.steps=2", "train.batch_size=2", "data.window=128", "train.workers=0", "train.precision=float32"]
    argv = [
        "study.py",
        "--model",
        str(TINY),
        "--text",
        str(tmp_path / "text"),
        "--plan",
        str(plan),
        "--base-model",
        "t",
    ]
    argv += [
        "--out",
        str(tmp_path / "out"),
        "--work",
        str(tmp_path / "work"),
        "--windows",
        "512",
        "1024",
    ]
    argv += ["--prompts", "2", "--key-windows", "1024", *(part for one in small for part in ("--set", one))]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.chdir(tmp_path)
    recomputed, train = [], study.train_loaded

    def watched(recipe: Any, model: Any, *rest: Any, **options: Any) -> Any:
        recomputed.append(model.is_gradient_checkpointing)
        return train(recipe, model, *rest, **options)

    monkeypatch.setattr(study, "train_loaded", watched)
    assert study.main() == 0
    assert recomputed == [False, False, False]  # also after the run that turns it on
    records = {name: Record.load(tmp_path / "out" / f"study_{name}.json") for name in [*rows, "base-ntk"]}
    for name, record in records.items():
        found = {(r["window"], r["scale"]) for r in record.rows if r["metric"] == "perplexity"}
        assert found == {(512, 1.0), (1024, 2.0)}
        scored = {r["n"] for r in record.rows if r["metric"] == "perplexity"}
        assert scored == {2 * (1024 - 2)}  # the same tokens at both windows
        # Two documents, so each row has an interval over them.
        assert all(r["documents"] == 2 and r["low"] <= r["value"] <= r["high"]
                   for r in record.rows if r["metric"] == "perplexity")  # fmt: skip
        assert record.config["recipe"]["name"] == name
    # Nothing of the way is the base; what stands first is what the recipe saves, 0.8 of the way.
    native = {name: [(r.get("interpolation"), r["value"]) for r in record.rows if r["metric"] == "perplexity"
                     and r["window"] == 512] for name, record in records.items()}  # fmt: skip
    assert [share for share, _ in native["recommended"]] == [None, 0, 1, 0.8]
    saved, base, whole, own = (value for _, value in native["recommended"])
    assert load_recipe("recommended").train.interpolation == 0.8
    assert own == saved and base == pytest.approx(native["base-ntk"][0][1], rel=1e-6)
    assert len({saved, base, whole}) == 3
    table = (tmp_path / "work" / "plan.md").read_text()
    assert all(f"| {name} · " in table for name in rows) and (tmp_path / "work" / "plan.html").is_file()
    assert f"{tmp_path / 'work' / 'plan.html'}" in capsys.readouterr().out
    assert study.main() == 0  # what is measured is not trained again
    assert capsys.readouterr().out.count("already measured") == 4
    assert torch.is_grad_enabled()
