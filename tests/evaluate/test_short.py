"""Short tasks through the harness into a Record: a folder of YAML tasks, scales, resume, what is out of reach."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from architectures import WINDOW, tiny_model
from checkpoints import checkpoint_info
from harness_tasks import NAMES, write_tasks
from texts import character_tokenizer

from e2llm.evaluate.paper_average import PAPER_TASKS
from e2llm.evaluate.short import _identity, evaluate_short, load_tasks, run
from e2llm.evaluate.suite_config import SuiteConfig
from e2llm.evaluate.task_suites import LeftOutWarning
from e2llm.hf import CheckpointInfo, install, save_model
from e2llm.infer import Engine
from e2llm.intervals import interval_of_perplexity
from e2llm.records import Record

pytest.importorskip("lm_eval")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def config(folder: Path | str, **options: Any) -> SuiteConfig:
    defaults: dict[str, Any] = {"suite": "short", "model": "m", "tasks_folder": str(folder), "device": "cpu"}
    return SuiteConfig(**(defaults | options))


def engine() -> Engine:
    model = tiny_model("llama")
    install(model, method="yarn")
    return Engine(model, character_tokenizer(), max_scale=8.0)


def test_record_of_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    info = CheckpointInfo(
        method="yarn", native_window=WINDOW, training_window=WINDOW, max_scale=8.0, base_model="x/tiny",
        checkpoint="paper",
    )  # fmt: skip
    checkpoint = save_model(tiny_model("llama"), character_tokenizer(), tmp_path / "model", info)
    out = tmp_path / "short.json"
    with pytest.warns(LeftOutWarning, match="requests longer than the model's window lost their beginning") as warned:
        run(config(folder, model=str(checkpoint), scales=(1, 4), batch_size=4, out=str(out)), progress=False)
    record = Record.load(out)
    found = {(one["task"], one["harness_metric"], one["scale"]): one for one in record.rows}
    assert set(found) == {
        (task, metric, scale)
        for task, metric in (
            ("local_choice", "acc"), ("local_choice", "acc_norm"), ("local_answer", "exact_match"),
            ("local_text", "word_perplexity"), ("local_text", "byte_perplexity"),
        )
        for scale in (1.0, 4.0)
    }  # fmt: skip
    accuracy = found["local_choice", "acc", 1.0]
    own = [e["score"] for e in record.examples if all(e.get(k) == accuracy[k] for k in ("harness_metric", "scale"))]
    assert len(own) == accuracy["n"] == 11 and accuracy["value"] == pytest.approx(sum(own) / 11)
    assert accuracy["metric"] == "accuracy" and accuracy["low"] <= accuracy["value"] <= accuracy["high"]
    # A corpus perplexity is no mean of its samples: the bootstrap of the ratio, apart from the harness.
    text = found["local_text", "byte_perplexity", 1.0]
    pairs = [
        e["score"] for e in record.examples if e.get("harness_metric") == "byte_perplexity" and e["scale"] == 1.0
    ]
    expected = interval_of_perplexity([-nats for nats, _ in pairs], [count for _, count in pairs])
    assert expected is not None and text["n"] == 11
    assert (text["low"], text["high"]) == pytest.approx((expected.low, expected.high), rel=1e-6)
    assert all(row["low"] <= row["value"] <= row["high"] for row in record.rows)
    assert record.config["requests_by_scale"]["local_choice, scale 4"] == {"4": 33}
    # The window of scale 1 holds 64 characters and one that is only scored.
    tasks, cut = load_tasks(config(folder))[0], record.config["requests_cut"]
    rows = [(row["question"], row["choices"]) for row in tasks["local_choice"].eval_docs]
    long = sum(len(question) + 1 + len(choice) > WINDOW + 1 for question, choices in rows for choice in choices)
    assert 0 < long < 33 and cut["local_choice, scale 1"] == long == accuracy["cut"]
    assert f"local_choice, scale 1: {long} of 33" in str(warned[0].message)
    assert cut["local_text, scale 1"] == cut["local_choice, scale 4"] == 0 and set(cut) == {
        f"{task}, scale {scale}" for task in NAMES for scale in (1, 4)
    }
    assert record.config["averages_left_out"] == {} and "requests_by_group" not in record.config


def test_a_finished_task_is_not_measured_again(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(folder, tasks=("local_choice", "local_answer"), max_examples=3)
    tasks, left_out = load_tasks(settings)
    assert not left_out
    partial = tmp_path / "partial.jsonl"
    first = evaluate_short(engine(), tasks, settings, partial=partial)
    assert {one["scale"] for one in first.rows} == {None} and all(one["n"] == 3 for one in first.rows)
    assert len(first.config["requests_by_scale"]["local_choice, scale chosen"]) >= 2

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("measured again")

    monkeypatch.setattr("lm_eval.simple_evaluate", fails)
    again = evaluate_short(engine(), tasks, settings, partial=partial)
    assert again.rows == first.rows and again.config["requests_cut"] == first.config["requests_cut"]
    with pytest.raises(AssertionError, match="measured again"):
        evaluate_short(engine(), tasks, config(folder, max_examples=4), partial=partial)


def test_scales_beyond_training_are_marked(folder: Path) -> None:
    settings = config(folder, tasks=("local_answer",), max_examples=2, scales=(8, 16))
    trained = engine()
    trained.info = checkpoint_info()
    rows = evaluate_short(trained, load_tasks(settings)[0], settings).rows
    assert [(row["scale"], row.get("beyond_trained")) for row in rows] == [(8, None), (16, True)]


def test_other_documents_are_another_measurement(tmp_path: Path) -> None:
    """The same task file over changed data: nothing kept may stand in for it."""
    settings = config(write_tasks(tmp_path / "t"), tasks=("local_choice",), max_examples=2)
    (before,) = load_tasks(settings)[0].values()
    rows = (tmp_path / "t" / "rows.json").read_text()
    again = load_tasks(settings)[0]["local_choice"]
    assert _identity(before) == _identity(again)
    (tmp_path / "t" / "rows.json").write_text(rows.replace('"label": 0', '"label": 1', 1))
    assert _identity(load_tasks(settings)[0]["local_choice"]) != _identity(before)


def test_the_papers_tasks_have_an_average_row(folder: Path, tmp_path: Path) -> None:
    """Stand-ins of the same names; one scale each. Without one of them it is named."""
    text = (folder / "local_choice.yaml").read_text()
    for name in PAPER_TASKS:
        (tmp_path / f"{name}.yaml").write_text(text.replace("local_choice", name))
    settings = config(tmp_path, max_examples=2, scales=(8, 4))
    tasks, _ = load_tasks(settings)
    record = evaluate_short(engine(), tasks, settings)
    averages = [row for row in record.rows if row["task"] == "average"]
    assert [(row["harness_metric"], row["scale"]) for row in averages] == [
        (metric, scale) for scale in (8.0, 4.0) for metric in ("acc", "acc_norm")
    ]
    for row in averages:
        own = [one["value"] for one in record.rows if one["task"] in PAPER_TASKS
               and all(one[name] == row[name] for name in ("scale", "harness_metric"))]  # fmt: skip
        assert len(own) == 7 and row["n"] == 14 and row["value"] == pytest.approx(sum(own) / 7)
        assert row["low"] <= row["value"] <= row["high"]
        assert (row["checkpoint"], row["suite"], row["tasks"]) == ("base", "short", "table7")
    del tasks["race"]
    record = evaluate_short(engine(), tasks, config(tmp_path, max_examples=2, scales=(8,)))
    assert record.config["averages_left_out"] == {"table7": ["race"]}
    assert all(row["task"] != "average" for row in record.rows)


def test_self_extend_reads_short_tasks_too(folder: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    tiny_model("llama").save_pretrained(model)
    character_tokenizer().save_pretrained(model)
    settings: dict[str, Any] = {"model": str(model), "tasks": ("local_choice",), "max_examples": 4}
    out = tmp_path / "short.json"
    run(config(folder, **settings, method="self_extend", neighbours=20, scales=(4.0,), out=str(out)), progress=False)
    record = Record.load(out)
    assert {(row["method"], row["neighbours"]) for row in record.rows} == {("self_extend", 20)}
    assert record.config["method"] == "self_extend"
    assert record.config["requests_by_scale"] == {"local_choice, scale 4": {"4": 12}}
    assert record.config["requests_cut"] == {"local_choice, scale 4": 0}


def test_every_task_of_a_folder_is_taken(folder: Path) -> None:
    assert set(load_tasks(config(folder))[0]) == set(NAMES)


@pytest.mark.slow
def test_the_papers_tasks_out_of_reach_are_named() -> None:
    """Tests run with HF_HUB_OFFLINE: none of them can be had. The harness reads all of its task files first."""
    with pytest.warns(LeftOutWarning) as warned, pytest.raises(ValueError, match=r"data of none of piqa.* is in reach"):
        load_tasks(config("hub"))
    assert len([one for one in warned if "left out" in str(one.message)]) == len(PAPER_TASKS)


def test_a_file_that_is_no_yaml_is_named_beside_good_ones(tmp_path: Path) -> None:
    """The harness would leave it out without a word, and its task with it."""
    folder = write_tasks(tmp_path)
    assert set(load_tasks(config(folder))[0]) == set(NAMES)
    (folder / "tagged.yaml").write_text("task: tagged\ndataset_path: json\nprocess_results: !function utils.score\n")
    (folder / "utils.py").write_text("def score(doc, results):\n    return {}\n")
    load_tasks(config(folder, tasks=NAMES))  # the harness' own tags are no mistake
    (folder / "broken.yaml").write_text("task: broken\n  dataset_path: [json\n")
    with pytest.raises(ValueError, match=r"broken.yaml is no YAML \(.*line 2.*\); mend it"):
        load_tasks(config(folder, tasks=NAMES))


def test_folders_that_hold_no_task_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        load_tasks(config(tmp_path / "no"))
    with pytest.raises(ValueError, match="no YAML task"):
        load_tasks(config(tmp_path))
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "x.yaml").write_text("task: x\ndataset_path: json\ndataset_kwargs:\n  data_files: nowhere.json\n")
    with pytest.raises(ValueError, match="tasks: x cannot be loaded"):
        load_tasks(config(tmp_path / "t"))
