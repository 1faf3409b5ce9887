"""Two processes measure what one does, to the last bit, each its own documents and prompts; a killed run goes on."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from architectures import WINDOW, tiny_model
from harness_tasks import write_tasks
from texts import BYTE_VOCABULARY, byte_tokenizer

from e2llm.evaluate.launch import num_processes
from e2llm.evaluate.partial import Finished, files, remove
from e2llm.evaluate.ranks import Ranks, launched
from e2llm.hf import CheckpointInfo, save_model
from e2llm.records import Record

WORDS = [f"{a}{b}{c}word" for a in "bdfgk" for b in "aeiou" for c in "lmnrst"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint, three documents (so that shares differ) and two LongBench tasks."""
    root = tmp_path_factory.mktemp("ranks")
    info = CheckpointInfo(
        method="yarn", native_window=WINDOW, training_window=WINDOW, max_scale=32.0, base_model="x/tiny",
        checkpoint="paper",
    )  # fmt: skip
    save_model(tiny_model("llama", vocab_size=BYTE_VOCABULARY), byte_tokenizer(), root / "model", info)
    draw = random.Random(0)
    for name in "abc":
        (root / "texts").mkdir(exist_ok=True)
        (root / "texts" / f"{name}.txt").write_text(" ".join(draw.choices(WORDS, k=500)))
    (root / "tasks").mkdir()
    for task, count in (("hotpotqa", 9), ("lcc", 8)):
        rows = [
            {"_id": f"{i}", "input": "Who?", "context": " ".join(draw.choices(WORDS, k=90)), "answers": ["x"]}
            for i in range(count)
        ]
        (root / "tasks" / f"{task}.jsonl").write_text(
            "\n".join(json.dumps(row | {"all_classes": None}) for row in rows)
        )
    (root / "yaml").mkdir()
    write_tasks(root / "yaml")
    return root


TEXTS = [
    *("--corpus", "noise=texts", "--windows", "640", "1280", "--max-strides", "2", "--stride", "64", "--prompts", "3"),
    *("--protocols", "whole", "sliding", "position", "difference", "key_tokens", "pass_key", "needle"),
    *("niah_single_1", "attention"),
]
TASKS = ["--suite", "longbench", "--tasks-folder", "tasks", "--windows", "512", "1024", "--tasks", "hotpotqa", "lcc"]

SHORT = ["--suite", "short", "--tasks-folder", "yaml", "--scales", "1", "2", "--max-examples", "6"]

CASES = [
    pytest.param(TEXTS, id="texts"),
    pytest.param(TASKS, id="tasks"),
    pytest.param([*TASKS, "--batch-size", "3"], id="batches", marks=pytest.mark.slow),
    pytest.param(SHORT, id="short", marks=pytest.mark.slow),
]


def start(
    folder: Path, processes: int, arguments: list[str], out: str, command: str = "evaluate"
) -> subprocess.Popen[str]:
    """`e2llm evaluate` (or calibrate) in so many processes; one thread each, as the order of sums depends on their
    number."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    line = [sys.executable, *launcher, "-m", "e2llm", command, "model", *arguments, "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [*line, "--out", out], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


def evaluated(
    folder: Path, processes: int, arguments: list[str], out: str, command: str = "evaluate"
) -> tuple[Record, str]:
    output, errors = (process := start(folder, processes, arguments, out, command)).communicate(timeout=240)
    assert process.returncode == 0, errors[-3000:]
    return Record.load(folder / out), output


def test_the_command_starts_itself_in_several_processes(folder: Path) -> None:
    """The same Record as alone, one output; a mistake is told once and gives the command's own exit status."""
    arguments = ["--corpus", "noise=texts", "--windows", "640", "--protocols", "whole", "pass_key", "--prompts", "3"]
    alone, _ = evaluated(folder, 1, arguments, "alone.json")
    spread, output = evaluated(folder, 1, [*arguments, "--gpus", "2"], "spread.json")
    assert spread.rows == alone.rows and spread.examples == alone.examples
    assert spread.config | {"out": "alone.json"} == alone.config and output.count("spread.json") == 1
    wrong = start(folder, 1, ["--corpus", "noise=absent", "--gpus", "2"], "wrong.json")
    output, errors = wrong.communicate(timeout=240)
    assert wrong.returncode == 2 and not output
    assert errors.count("e2llm evaluate: corpora.noise = absent: no such file") == 1 and "Traceback" not in errors


def test_ctrl_c_ends_all_processes_and_keeps_what_is_done(folder: Path) -> None:
    arguments = ["--corpus", "noise=texts", "--windows", "640", "--protocols", "whole", "pass_key", "--prompts", "5000"]
    process = start(folder, 1, [*arguments, "--gpus", "2"], "stopped.json")
    kept = folder / "stopped.json.partial.jsonl"
    end = time.monotonic() + 120
    while not files(kept) and time.monotonic() < end and process.poll() is None:
        time.sleep(0.2)
    started = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors, errors[-2000:]
    assert len(started) >= 2 and not any(one.is_running() for one in started), "a process goes on"
    assert files(kept) and not (folder / "stopped.json").exists()
    remove(kept)


@pytest.mark.parametrize(
    ("given", "device", "visible", "processes"),
    [
        *[(None, None, 0, 1), (None, None, 4, 4), (None, "cuda", 4, 4), (2, None, 4, 2), (1, None, 4, 1)],
        *[(None, "cpu", 4, 1), (2, "cpu", 0, 2), (None, "cuda:1", 4, 1), (None, "mps", 0, 1)],
    ],
)
def test_processes_for_the_gpus_there_are(
    given: int | None, device: str | None, visible: int, processes: int
) -> None:
    assert num_processes(given, device, {}, visible) == processes
    launched_by_others = {"WORLD_SIZE": "3"}
    assert num_processes(3 if given else None, device, launched_by_others, visible) == 1


@pytest.mark.parametrize(
    ("given", "device", "environment", "message"),
    [
        (0, None, {}, "gpus = 0: use at least 1"),
        (5, None, {}, "gpus = 5: 4 are visible"),
        (2, "cuda:1", {}, "device = 'cuda:1' names one"),
        (2, None, {"WORLD_SIZE": "3"}, "a launcher has started 3 processes"),
    ],
)
def test_gpus_that_cannot_be_had(given: int, device: str | None, environment: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        num_processes(given, device, environment, 4)


@pytest.mark.parametrize("arguments", CASES)
def test_two_processes_equal_one_to_the_last_bit(folder: Path, arguments: list[str]) -> None:
    alone, _ = evaluated(folder, 1, arguments, "one.json")
    together, output = evaluated(folder, 2, arguments, "two.json")
    assert together.rows == alone.rows and together.examples == alone.examples and len(alone.rows) > 3
    assert together.config | {"out": "one.json"} == alone.config
    assert output.count("two.json") == 1 and not list(folder.glob("*.partial*"))


@pytest.mark.slow
def test_two_processes_calibrate_as_one(folder: Path) -> None:
    """They ask the same questions in turn: one that asked another would wait for ever."""
    arguments = ["--corpus", "noise=texts", "--windows", "640", "1280", "--ratios", "0.75", "0.875", "1", "1.25"]
    arguments += ["--prompts", "5"]
    kept = (folder / "model" / "e2llm.json").read_text()
    schedules, records = [], []
    for processes in (1, 2):
        records.append(evaluated(folder, processes, arguments, "calibrated.json", "calibrate")[0])
        schedules.append((folder / "model" / "e2llm.json").read_text())
        (folder / "model" / "e2llm.json").write_text(kept)
    assert schedules[0] == schedules[1] != kept
    assert records[0].rows == records[1].rows and records[0].config == records[1].config
    assert {row["metric"] for row in records[0].rows} == {"perplexity", "retrieval"}


def test_a_killed_run_goes_on_with_another_number_of_processes(folder: Path) -> None:
    expected, _ = evaluated(folder, 1, TASKS, "unbroken.json")
    process = start(folder, 2, TASKS, "killed.json")
    partial = folder / "killed.json.partial.jsonl"
    deadline = time.monotonic() + 200
    while sum(file.read_text().count("\n") for file in files(partial)) < 4 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    launcher = psutil.Process(process.pid)
    for one in [*launcher.children(recursive=True), launcher]:
        one.kill()
    process.communicate()
    assert files(partial) and not (folder / "killed.json").exists()
    record, _ = evaluated(folder, 1, TASKS, "killed.json")
    assert record.rows == expected.rows and record.examples == expected.examples
    assert not files(partial)


def test_shares_are_every_nth_and_results_keep_the_order() -> None:
    items = list(range(7))
    shares = [Ranks(index, 3).own(items) for index in range(3)]
    assert shares == [[0, 3, 6], [1, 4], [2, 5]]
    assert Ranks().share(items, lambda own: [10 * item for item in own]) == [10 * item for item in items]
    assert Ranks().from_first("x") == "x" and launched("cpu") == Ranks()


def test_each_process_keeps_a_file_and_all_are_read(tmp_path: Path) -> None:
    path = tmp_path / "r.json.partial.jsonl"
    result: dict[str, Any] = {"rows": []}
    for index in range(2):
        Finished(path, index).add(f"key{index}", {}, result)
    (tmp_path / "r.json.partial.jsonl.txt").write_text("another's")
    assert len(files(path)) == 2
    for index in range(3):
        found = Finished(path, index)
        assert found.get("key0") == found.get("key1") == result and found.get("key2") is None
    remove(path)
    assert [file.name for file in tmp_path.iterdir()] == ["r.json.partial.jsonl.txt"]


def test_a_device_by_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="device = 'cuda:1': 2 processes run"):
        launched("cuda:1")
