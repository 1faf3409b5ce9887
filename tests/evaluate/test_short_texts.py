"""Short tasks whose texts the tokenizer cannot write: left out and counted, never scored as wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from architectures import tiny_model
from harness_tasks import write_tasks
from texts import character_tokenizer

from e2llm.evaluate.short import evaluate_short, load_tasks
from e2llm.evaluate.suite_config import SuiteConfig
from e2llm.evaluate.task_suites import LeftOutWarning
from e2llm.hf import install
from e2llm.infer import Engine
from e2llm.records import Record
from e2llm.report import render_page

pytest.importorskip("lm_eval")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
FOREIGN = "漢字かな交じり文です"


def measured(folder: Path, *tasks: str, partial: Path | None = None, **options: Any) -> Record:
    model = tiny_model("llama")
    install(model, method="yarn")
    engine = Engine(model, character_tokenizer(), max_scale=8.0)
    config = SuiteConfig(suite="short", model="m", tasks_folder=str(folder), tasks=tasks, device="cpu", **options)
    return evaluate_short(engine, load_tasks(config)[0], config, partial=partial)


def change(folder: Path, **changes: Any) -> None:
    """Fields of rows by number: question={1: "…"}."""
    rows = json.loads((folder / "rows.json").read_text())
    for field, values in changes.items():
        for number, value in values.items():
            rows[number][field] = value
    (folder / "rows.json").write_text(json.dumps(rows))


@pytest.mark.filterwarnings("ignore::e2llm.evaluate.task_suites.LeftOutWarning")
def test_the_others_are_scored_as_they_are_without_them(tmp_path: Path) -> None:
    """A question and a continuation that are lost; the rows of the rest equal those of a folder without the two."""
    folder = write_tasks(tmp_path / "tasks")
    plain = measured(folder, "local_choice", max_examples=6)
    assert {row["skipped"] for row in plain.rows} == {0} and plain.config["skipped"] == {}
    change(folder, question={1: FOREIGN}, choices={4: ["a", FOREIGN, "b"]})
    with pytest.warns(LeftOutWarning, match=r"short local_choice: 2 left out, the Record says which; first: sample 1"):
        found = measured(folder, "local_choice", max_examples=6, partial=tmp_path / "kept.jsonl")
    about = found.config["skipped"]["local_choice"]
    assert about["count"] == 2 and [reason[:9] for reason in about["reasons"]] == ["sample 1:", "sample 4:"]
    assert "the tokenizer cannot encode it: 100% of its characters are lost (漢" in about["reasons"][0]
    assert {(row["n"], row["skipped"]) for row in found.rows} == {(4, 2)}

    def scores(record: Record) -> dict[tuple[str, int], float]:
        return {(one["harness_metric"], one["id"]): one["score"] for one in record.examples}

    assert scores(found) == {key: score for key, score in scores(plain).items() if key[1] not in (1, 4)}
    again = measured(folder, "local_choice", max_examples=6, partial=tmp_path / "kept.jsonl")
    assert (again.rows, again.config["skipped"]) == (found.rows, found.config["skipped"])


@pytest.mark.filterwarnings("ignore::e2llm.evaluate.task_suites.LeftOutWarning")
def test_a_task_of_which_nothing_is_left_is_named_in_the_report(tmp_path: Path) -> None:
    folder = write_tasks(tmp_path / "tasks")
    change(folder, text=dict.fromkeys(range(11), FOREIGN))
    record = measured(folder, "local_text", "local_answer")
    assert {row["task"] for row in record.rows} == {"local_answer"}
    assert record.config["skipped"]["local_text"]["count"] == 11
    assert "Skipped, base · yarn: local_text 11 of 11 (the tokenizer cannot encode it" in render_page([record])
    with pytest.raises(ValueError, match=r"short: no sample could be asked; first: local_text, sample 0: the tokeniz"):
        measured(folder, "local_text")


def test_examples_before_the_question_are_drawn_as_without_looking(tmp_path: Path) -> None:
    """The harness, asked directly, gives the same scores: looking at the texts takes nothing from its generator."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    folder = write_tasks(tmp_path / "tasks")
    shots = folder / "local_choice.yaml"
    shots.write_text(shots.read_text() + "num_fewshot: 2\nfewshot_split: test\n")
    rows = json.loads((folder / "rows.json").read_text())
    (folder / "rows.json").write_text(json.dumps([row | {"question": row["question"][:6]} for row in rows]))
    record = measured(folder, "local_choice", scales=(1,), batch_size=1, seed=3)
    task = TaskManager(include_path=str(folder), include_defaults=False).load(["local_choice"])["tasks"]["local_choice"]
    plain = HFLM(tiny_model("llama"), tokenizer=character_tokenizer(), backend="causal", batch_size=1)
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), 3)
    quiet: dict[str, Any] = {"task_manager": TaskManager(include_defaults=False), "bootstrap_iters": 0}
    expected = simple_evaluate(model=plain, tasks=[task], **quiet, **seeds)["results"]["local_choice"]
    found = {row["harness_metric"]: row["value"] for row in record.rows}
    assert found == {"acc": expected["acc,none"], "acc_norm": expected["acc_norm,none"]}
    hashes = {one["doc_hash"] for one in record.examples}
    assert len(hashes) == 11
