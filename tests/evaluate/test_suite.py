"""From task files to a Record through the engine; a stopped run goes on; what cannot be measured is named."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from architectures import WINDOW, tiny_model
from checkpoints import checkpoint_info
from texts import BYTE_VOCABULARY, byte_tokenizer

from e2llm.evaluate import suite as suite_module
from e2llm.evaluate.longbench.averages import SETS
from e2llm.evaluate.longbench.tasks import TASKS
from e2llm.evaluate.run import load_engine
from e2llm.evaluate.suite import evaluate_suite, plan_cells, run
from e2llm.evaluate.suite_config import SuiteConfig
from e2llm.evaluate.task_suites import SUITES, LeftOutWarning, load_data
from e2llm.hf import CheckpointInfo, install, save_model, self_extend
from e2llm.infer import Engine
from e2llm.records import Record

pytestmark = pytest.mark.filterwarnings("ignore:longbench. no data for:e2llm.evaluate.task_suites.LeftOutWarning")


def row(index: int, **fields: Any) -> dict[str, Any]:
    context = f"Passage {index}. " + "Bob Dylan sang. " * 30
    return {"_id": f"id{index}", "input": "Who sang?", "context": context, "answers": ["Bob Dylan", "Dylan"],
            "all_classes": None} | fields  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("longbench")
    rows = {
        "hotpotqa": [row(i) for i in range(3)],
        "lcc": [row(i, answers=["return x"]) for i in range(2)],
        "passage_retrieval_zh": [row(i, answers=[f"段落{i}"]) for i in (1, 2)],
    }
    for task, found in rows.items():
        (root / f"{task}.jsonl").write_text("\n".join(json.dumps(one) for one in found), encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    info = CheckpointInfo(
        method="yarn", native_window=WINDOW, training_window=WINDOW, max_scale=16.0, base_model="some/tiny",
        checkpoint="paper",
    )  # fmt: skip
    model = tiny_model("llama", vocab_size=BYTE_VOCABULARY)
    return save_model(model, byte_tokenizer(), tmp_path_factory.mktemp("models") / "tiny", info)


def config(folder: Path, **options: Any) -> SuiteConfig:
    defaults: dict[str, Any] = {"suite": "longbench", "model": "tiny", "tasks_folder": str(folder), "device": "cpu"}
    return SuiteConfig(**(defaults | options))


def engine(method: str = "yarn", chat: bool = True) -> Engine:
    model = tiny_model("llama", vocab_size=BYTE_VOCABULARY)
    install(model, method=method)
    return Engine(model, byte_tokenizer(chat))


def measured(folder: Path, found: Engine | None = None, **options: Any) -> Record:
    settings = config(folder, **options)
    suite = SUITES[settings.suite]
    return evaluate_suite(found or engine(), suite, load_data(suite, settings), settings)


def test_record_of_a_checkpoint(folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "record.json"
    run(config(folder, model=str(checkpoint), windows=(512, 256), out=str(out)), progress=False)
    record = Record.load(out)
    assert not list(out.parent.glob("*.partial*"))
    labels = {"base_model": "tiny", "checkpoint": "paper", "method": "yarn", "suite": "longbench", "seed": 0}
    assert all(one | labels == one for one in record.rows)
    assert [(one["task"], one["window"], one["scale"], one["n"]) for one in record.rows] == [
        ("hotpotqa", 256, 4.0, 3), ("passage_retrieval_zh", 256, 4.0, 2), ("lcc", 256, 4.0, 2),
        ("hotpotqa", 512, 8.0, 3), ("passage_retrieval_zh", 512, 8.0, 2), ("lcc", 512, 8.0, 2),
    ]  # fmt: skip
    metrics = {"hotpotqa": ("f1", "en"), "lcc": ("edit_similarity", "en"), "passage_retrieval_zh": ("accuracy", "zh")}
    assert all((one["metric"], one["language"]) == metrics[one["task"]] for one in record.rows)
    for one in record.rows:
        own = [e for e in record.examples if (e["task"], e["window"]) == (one["task"], one["window"])]
        assert one["value"] == pytest.approx(sum(e["score"] for e in own) / len(own)) and len(own) == one["n"]
        assert one["cut"] == sum(e["cut_tokens"] > 0 for e in own)
    for example in record.examples:
        room = example["window"] - TASKS[example["task"]].max_new_tokens
        assert example["prompt_tokens"] == room if example["cut_tokens"] else example["prompt_tokens"] <= room
        assert example["chat"] is (example["task"] != "lcc") and example["seed"] == 0
    assert any(example["cut_tokens"] for example in record.examples)
    assert record.config["averages_left_out"].keys() == SETS.keys()
    assert "qasper" in record.config["tasks_without_data"] and record.config["tasks_folder"] == folder.name
    assert str(tmp_path) not in out.read_text()


def test_answers_are_the_engines_own(folder: Path) -> None:
    found = engine()
    found.max_scale = 16.0
    record = measured(folder, found, tasks=("lcc",), windows=(1024,))
    rows = [json.loads(line) for line in (folder / "lcc.jsonl").read_text().splitlines()]
    for example, one in zip(record.examples, rows, strict=True):
        prompt = f"Please complete the code given below. \n{one['context']}Next line of code:\n"
        assert example["answer"] == found.generate(prompt, max_new_tokens=64, scale=16).text


def test_a_stopped_run_goes_on(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(folder, windows=(512,))
    data = load_data(SUITES["longbench"], settings)
    whole = evaluate_suite(engine(), SUITES["longbench"], data, settings)
    partial = tmp_path / "partial.jsonl"
    complete, asked = Engine.complete, 0

    def stops(self: Engine, *args: Any, **kwargs: Any) -> Any:
        nonlocal asked
        asked += 1
        if asked == 5:
            raise KeyboardInterrupt
        return complete(self, *args, **kwargs)

    monkeypatch.setattr(Engine, "complete", stops)
    with pytest.raises(KeyboardInterrupt):
        evaluate_suite(engine(), SUITES["longbench"], data, settings, partial=partial)
    again = evaluate_suite(engine(), SUITES["longbench"], data, settings, partial=partial)
    assert asked == 5 + 7 - 4  # four answers were kept
    assert again.rows == whole.rows and again.examples == whole.examples
    # Another scale is another question.
    evaluate_suite(engine(), SUITES["longbench"], data, config(folder, windows=(512,), scales=(2,)), partial=partial)
    assert asked == 8 + 7


def test_each_prompt_at_its_own_scale(tmp_path: Path) -> None:
    lines = [json.dumps(row(size, context="x" * size, answers=["x"])) for size in (50, 100, 300, 2000)]
    (tmp_path / "lcc.jsonl").write_text("\n".join(lines))
    found = engine()
    found.max_scale = 16.0
    record = measured(tmp_path, found, windows=(1024,), scale_per_request=True)
    assert [one["scale"] for one in record.rows] == [None]
    # Around the context stand 58 bytes, and 64 new tokens: 172, 222, 422, and the window.
    assert [example["scale"] for example in record.examples] == [4.0, 4.0, 8.0, 16.0]
    assert [example["prompt_tokens"] for example in record.examples] == [108, 158, 358, 960]


def test_averages_appear_with_a_whole_set(tmp_path: Path) -> None:
    for task in SETS["zh4"]:
        classes = ["教育", "军事"] if task == "lsht" else None
        text = json.dumps(row(0, context="教育" * 20, answers=["教育"], all_classes=classes))
        (tmp_path / f"{task}.jsonl").write_text(text + "\n" + text.replace("id0", "id1"))
    record = measured(tmp_path, windows=(1024,))
    overall = [one for one in record.rows if one["metric"] == "average"]
    assert [(one["tasks"], one["average"], one["n"]) for one in overall] == [("zh4", "plain", 8), ("zh4", "macro", 8)]
    tasks = [one["value"] for one in record.rows if "task" in one]
    assert overall[0]["value"] == pytest.approx(sum(tasks) / 4)


def test_samples_that_cannot_be_asked_are_counted(folder: Path) -> None:
    """A window that holds the questions of one task and not of another: 512 new tokens of L-Eval."""
    with pytest.warns(LeftOutWarning, match=r"lcc: 2 left out.*use a larger window"):
        record = measured(folder, windows=(64,))
    assert [one["task"] for one in record.rows] == ["hotpotqa", "passage_retrieval_zh"]
    assert record.config["skipped"]["lcc"]["count"] == 2
    with pytest.raises(ValueError, match=r"no sample could be asked; first: id0, window 32"):
        measured(folder, windows=(32,), tasks=("lcc",))


def test_a_skipped_row_is_counted_in_its_tasks_row(tmp_path: Path) -> None:
    (tmp_path / "hotpotqa.jsonl").write_text(json.dumps(row(0)) + "\n{}\n")
    with pytest.warns(LeftOutWarning, match="hotpotqa: 1 left out"):
        record = measured(tmp_path, windows=(256,))
    (found,) = record.rows
    assert (found["n"], found["skipped"]) == (1, 1)
    assert record.config["skipped"] == {
        "hotpotqa": {"count": 1, "reasons": ["line 2: context is missing, a text is expected"]}
    }


def test_a_model_without_template_is_refused_unless_asked_plainly(folder: Path) -> None:
    with pytest.raises(ValueError, match="chat template and this tokenizer has none; --no-chat"):
        measured(folder, engine(chat=False), windows=(256,))
    assert not any(e["chat"] for e in measured(folder, engine(chat=False), windows=(256,), chat=False).examples)
    assert measured(folder, engine(chat=False), windows=(256,), tasks=("lcc",)).rows  # no template is meant there


def test_windows_outside_the_models_range_are_refused(folder: Path, checkpoint: Path) -> None:
    trained = Engine.load(str(checkpoint), device="cpu")
    with pytest.raises(ValueError, match=r"2048 is above the model's range \(1024 tokens\).*--scales"):
        plan_cells(trained, config(folder, windows=(512, 2048)))
    assert [cell.scale for cell in plan_cells(trained, config(folder, windows=(2048,), scales=(16.0, 32.0)))] == [
        16,
        32,
    ]
    with pytest.raises(ValueError, match=r"128 is above the model's range \(64 tokens\)"):
        plan_cells(engine("none"), config(folder, windows=(128,)))
    with pytest.raises(ValueError, match="method none has no scale but 1"):
        plan_cells(engine("none"), config(folder, scales=(2.0,)))
    # A foreign model under a method was trained for no range: a baseline, measured where it is asked.
    assert plan_cells(engine(), config(folder, windows=(2048,)))[0].scale == 32


def test_self_extend_answers_at_the_scale_of_the_window(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is asked is asked with that group; the same prompt in a larger window is another part."""
    short = tmp_path / "short"
    short.mkdir()
    (short / "hotpotqa.jsonl").write_text(json.dumps(row(0, context="Bob Dylan sang. " * 8)))
    options: dict[str, Any] = {"method": "self_extend", "neighbours": 16, "windows": (512, 1024), "chat": False}
    settings = config(short, model=str(checkpoint), out=str(tmp_path / "record.json"), **options)
    asked: list[tuple[int, float]] = []
    seen: list[int] = []
    read_rows = self_extend._read_rows
    complete = Engine.complete

    def watched(self: Engine, prompt_ids: Any, plan: Any, **others: Any) -> Any:
        seen.clear()
        found = complete(self, prompt_ids, plan, **others)
        (group,) = set(seen)
        asked.append((group, plan.scale))
        return found

    def watched_rows(query: Any, key: Any, value: Any, tables: Any, group: int, *others: Any) -> Any:
        seen.append(group)
        return read_rows(query, key, value, tables, group, *others)

    monkeypatch.setattr(Engine, "complete", watched)
    monkeypatch.setattr(self_extend, "_read_rows", watched_rows)
    run(settings, progress=False)
    record = Record.load(settings.out)
    groups = {512: 11, 1024: 21}  # (64 - 16) * group + 16 tokens hold the window
    about = [(one["window"], one["scale"], one["method"], one["neighbours"]) for one in record.rows]
    assert about == [(window, window / 64, "self_extend", 16) for window in groups]
    assert asked == [(group, window / 64) for window, group in groups.items()]
    assert record.config["method"] == "self_extend" and record.config["neighbours"] == 16
    first, second = record.examples
    assert first["prompt_sha256"] == second["prompt_sha256"]
    partial, suite = tmp_path / "kept.jsonl", SUITES["longbench"]
    for _ in range(2):  # a rerun finds both
        evaluate_suite(load_engine(settings), suite, load_data(suite, settings), settings, partial=partial)
    kept = [json.loads(line)["key"] for line in partial.read_text().splitlines() if line]
    assert len(kept) == len(set(kept)) == 2


def test_leval_runs_the_same_way(tmp_path: Path) -> None:
    questions = {
        "instructions": ["Question 1. Which? A. x B. y", "Question 2. Which? A. x B. y"],
        "outputs": ["A", "AB"],
    }
    (tmp_path / "coursera.jsonl").write_text(json.dumps({"input": "A document. " * 200, **questions}))
    settings = config(tmp_path, suite="leval", windows=(2048,), tasks=("coursera",))
    record = evaluate_suite(engine(), SUITES["leval"], load_data(SUITES["leval"], settings), settings)
    (found,) = record.rows
    assert (found["metric"], found["task"], found["n"], found["cut"]) == ("accuracy", "coursera", 2, 2)
    assert all(e["prompt_tokens"] == 2048 - 512 for e in record.examples)
    assert found["guessed"] == sum(e["guessed"] for e in record.examples) and "beyond_trained" not in found
    trained = engine()
    trained.info = checkpoint_info()
    settings = dataclasses.replace(settings, scales=(4.0,))
    beyond = evaluate_suite(trained, SUITES["leval"], load_data(SUITES["leval"], settings), settings)
    assert [row["beyond_trained"] for row in beyond.rows] == [True]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"suite": "ruler"}, "suite = 'ruler': choose from"),
        ({"windows": (4,)}, "at least 8 tokens"),
        ({"scales": (2.0,), "scale_per_request": True}, "leave scales out"),
        ({"max_examples": 0}, "max_examples = 0: use at least 1"),
        ({"tasks": ("lcc", "lcc")}, "each task once"),
        ({"suite": "short", "windows": (64,)}, "short tasks have no window"),
        ({"model": ""}, "model = ''"),
        ({"method": "yarn", "neighbours": 8}, "neighbours = 8: at least 1, and with method = 'self_extend' only"),
    ],
)
def test_settings_that_cannot_be(folder: Path, options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        config(folder, **options)


def test_suites_are_known_to_the_command(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    from e2llm.cli import main

    assert main(["evaluate", "m", "--suite", "longbench", "--corpus", "a=b"]) == 2
    assert "--corpus: --suite longbench has no use for it" in capsys.readouterr().err
    assert main(["evaluate", "m", "--corpus", "a=b", "--tasks", "lcc"]) == 2
    assert "--tasks: it belongs to --suite" in capsys.readouterr().err
    assert main(["evaluate", "m", "--suite", "longbench", "--tasks-folder", str(tmp_path / "no")]) == 2
    assert "no such folder" in capsys.readouterr().err


@pytest.mark.filterwarnings("default::e2llm.evaluate.task_suites.LeftOutWarning")
def test_the_command_says_in_a_line_what_was_left_out(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path
) -> None:
    from e2llm.cli import main

    (tmp_path / "lcc.jsonl").write_text('{"context": "x"}\n', encoding="utf-8")
    (tmp_path / "trec.jsonl").write_text("", encoding="utf-8")
    assert main(["evaluate", str(checkpoint), "--suite", "longbench", "--tasks-folder", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert "no usable sample of longbench there; first complaint: lcc, line 1: input is missing" in told
    good = {"context": "Some code.", "input": "", "answers": ["x"]}
    (tmp_path / "lcc.jsonl").write_text(f'{{"context": "x"}}\n{json.dumps(good)}\n', encoding="utf-8")
    asked = ["--windows", "256", "--device", "cpu", "--out", str(tmp_path / "record.json")]
    assert main(["evaluate", str(checkpoint), "--suite", "longbench", "--tasks-folder", str(tmp_path), *asked]) == 0
    told = capsys.readouterr().err
    wanted = "warning: longbench lcc: 1 left out, the Record says which; first: line 1: input is missing"
    assert told.startswith(wanted) and ".py:" not in told
    assert "trec" in Record.load(tmp_path / "record.json").config["tasks_without_data"]


def test_the_command_prints_the_table(
    capsys: pytest.CaptureFixture[str], folder: Path, checkpoint: Path, tmp_path: Path
) -> None:
    from e2llm.cli import main

    out = tmp_path / "record.json"
    asked = ["evaluate", str(checkpoint), "--suite", "longbench", "--tasks-folder", str(folder), "--tasks", "lcc"]
    assert main([*asked, "--windows", "256", "--device", "cpu", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "## LongBench, tiny" in printed and "| lcc, edit\\_similarity, n = 2 |" in printed and str(out) in printed
    assert suite_module.DEFAULT_WINDOWS == (8192,)
