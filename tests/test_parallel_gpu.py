"""benchmarks/parallel_gpu.py: the calls that it makes, what it tries again, what it says is missing; its table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from scripts_of import load_script

import e2llm.benchmark.train as train_module
from e2llm.benchmark.train import TrainBenchConfig
from e2llm.cli import main
from e2llm.records import Record, make_row

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script(ROOT / "benchmarks" / "parallel_gpu.py")


def record_of(ways: Sequence[str], gpus: int = 4, **config: Any) -> Record:
    rows = []
    for number, way in [(1, "none"), *((gpus, way) for way in ways)]:
        labels: dict[str, Any] = {"trainer": "e2llm", "shape": "llama-1b", "window": 4096, "batch_size": 8}
        labels |= {"checkpointing": False, "gpus": number, "parallelism": way}
        speed = 60_000.0 if number == 1 else 60_000.0 * gpus * (0.5 if way == "tensor" else 0.9)
        rows.append(make_row("tokens_per_second", speed, "tokens/s", 3, **labels, low=speed / 2, high=speed * 2))
        rows.append(make_row("peak_memory_bytes", 7e10 / number, "bytes", 1, **labels))
        rows.append(make_row("model_flops_utilization", 0.4, "share", 3, **labels))
        if number > 1:
            rows.append(make_row("ratio_to_one_gpu", speed / 60_000, "ratio", 1, **labels))
    facts = {"shape": "llama-1b", "rounds": 1, "figure1": False, "failed": {}, "out_of_memory": [], "not_run": []}
    facts |= {"settings": ["train.optimizer=adamw"], "gpus": [1, gpus], "parallelism": list(ways)}
    return Record("benchmark_train", facts | config, rows, environment={"gpu": "G"})


def test_every_call_is_one_that_the_command_takes(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[TrainBenchConfig] = []

    def note(config: TrainBenchConfig, **options: Any) -> Record:
        seen.append(config)
        record = record_of(config.parallelism)
        options["save"](record)
        return record

    monkeypatch.setattr(train_module, "benchmark_train", note)
    monkeypatch.setattr(script, "run", lambda words, gpus, left: main(words))
    monkeypatch.setattr(script, "visible_gpus", lambda: ["0", "1", "2", "3"])
    common = ["--work", str(tmp_path / "work"), "--out", str(tmp_path)]
    assert script.main([*common, "--until", "500"]) == 0
    assert script.main([*common, "--gpus", "2", "--only", "tensor", "ddp"]) == 0
    assert script.main([*common, "--small"]) == 0
    whole, some, small = seen
    assert (whole.shape, whole.gpus, whole.trainers, whole.resume) == ("llama-1b", (1, 4), ("e2llm:8",), True)
    assert whole.parallelism == script.ORDER and 490 < whole.until <= 500
    assert whole.settings == ("train.optimizer=adamw", "model.dtype=float32")
    assert (some.gpus, some.parallelism) == ((1, 2), ("ddp", "tensor"))
    assert (small.shape, small.gpus, small.settings[-1]) == ("tiny", (1, 2), "train.compile=none")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--gpus", "4"], "--gpus 4: 2 are visible"),
        (["--only", "hsdp"], "--only hsdp: on 2 GPUs there are ddp, fsdp2, tensor"),
        (["--gpus", "1"], "ways to share a run need two or more"),
    ],
)
def test_what_cannot_be_measured_here_is_refused(
    given: list[str], told: str, script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script, "visible_gpus", lambda: ["0", "1"])
    monkeypatch.setattr(script, "run", lambda *given: pytest.fail("nothing may run"))
    with pytest.raises(SystemExit):
        script.main(given)
    assert told in capsys.readouterr().err


def test_what_fails_compiled_is_tried_without_and_what_lacks_a_package_is_said(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lacks = {"e2llm 8 x 4096 on 2 by zero3": "parallelism = 'zero3' needs a package: pip install deepspeed"}
    breaks = {"e2llm 8 x 4096 on 2 by tensor": "BackendCompilerFailed"}
    answers = [
        record_of(["ddp"], 2, failed=lacks | breaks),
        record_of(["tensor"], 2),
        record_of(["ddp"], 2, failed=breaks),
        record_of([], 2, failed=breaks),
        record_of([], 2, not_run=["e2llm 8 x 4096 on 2 by ddp"]),
        record_of([], 2, out_of_memory=["e2llm 8 x 4096 on 2 by ddp"]),
        record_of(["ddp"], 2, failed={"e2llm 8 x 4096": "RuntimeError"}),
    ]
    calls = []

    def run(words: list[str], gpus: Sequence[str], left: float) -> int:
        calls.append(words)
        answers.pop(0).save(Path(words[words.index("--out") + 1]))
        return 1

    monkeypatch.setattr(script, "run", run)
    monkeypatch.setattr(script, "visible_gpus", lambda: ["0", "1"])
    common = ["--work", str(tmp_path / "work"), "--out", str(tmp_path)]
    assert script.main([*common, "--only", "ddp", "tensor", "zero3"]) == 0
    assert "zero3: not measured, deepspeed is not installed: pip install deepspeed" in capsys.readouterr().out
    assert [Path(words[-1]).name for words in calls] == [
        "train_parallel_llama-1b_2.json",
        "train_parallel_llama-1b_2_uncompiled.json",
    ]
    second = calls[1]
    assert second[second.index("--parallelism") + 1] == "tensor" and "train.compile=none" in second
    assert "train.compile=none" not in calls[0]
    assert script.main([*common, "--only", "ddp", "tensor"]) == 1, "it failed without, too"
    assert "failed: tensor; the Record says why" in capsys.readouterr().out
    assert script.main([*common, "--only", "ddp"]) == 1
    assert "no time was left: ddp; call again" in capsys.readouterr().out
    assert script.main([*common, "--only", "ddp"]) == 0, "it does not fit, which is a result"
    assert script.main([*common, "--only", "ddp"]) == 1
    assert "failed: none; the Record says why" in capsys.readouterr().out
    assert not answers and len(calls) == 7


def test_a_call_that_is_refused_ends_the_script(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record_of(["ddp"], 2).save(tmp_path / "train_parallel_llama-1b_2.json")  # of an earlier call
    monkeypatch.setattr(script, "run", lambda *given: 2)
    monkeypatch.setattr(script, "visible_gpus", lambda: ["0", "1"])
    assert script.main(["--only", "ddp", "--out", str(tmp_path), "--work", str(tmp_path)]) == 2


def test_without_time_nothing_runs(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script, "run", lambda *given: pytest.fail("nothing may run"))
    monkeypatch.setattr(script, "visible_gpus", lambda: ["0", "1"])
    given = ["--until", "10", "--only", "ddp", "fsdp2", "--out", str(tmp_path), "--work", str(tmp_path)]
    assert script.main(given) == 1
    assert "no time was left: ddp, fsdp2; call again" in capsys.readouterr().out


def test_the_page_sets_the_ways_beside_each_other(tmp_path: Path) -> None:
    training = load_script(ROOT / "scripts" / "docs_training.py")

    def page_of(record: Record) -> str:
        record.save(tmp_path / "train_parallel_llama-1b.json")
        return training.training_page([Record.load(tmp_path / "train_parallel_llama-1b.json")])

    late = ["e2llm 8 x 4096 on 4 by zero3"]
    page = page_of(record_of(["ddp", "tensor", "fsdp2-offload"], not_run=late))
    assert "## Ways to share a run: llama-1b, 4 × G (`train_parallel_llama-1b`)" in page
    assert "by the same settings (`train.optimizer=adamw`)" in page
    assert "| one GPU | everything | 1 | 8 × 4k | 60,000 (30,000–120,000) |  |  | 40.0% | 70.0 GB |" in page
    assert "| ddp | everything | 4 | 32 × 4k | 216,000 (108,000–432,000) | 3.600 | 90% | 40.0% | 17.5 GB |" in page
    assert "fsdp2 over the pairs | 4 | 16 × 4k | 120,000 (60,000–240,000) | 2.000 | 50% |" in page
    assert "- `e2llm 8 x 4096 on 4 by zero3` was not run: time was up." in page
    assert "two GPUs at least" not in page and "dense peak, tensor" not in page, "no targets for four GPUs"
    page = page_of(record_of(["ddp", "tensor"], gpus=2))
    assert "| two GPUs at least 1.9 × one, ddp | 1.800 | **no** |" in page and "1.9 × one, tensor" not in page
    page = page_of(record_of(["ddp", "tensor"], gpus=2, settings=["train.compile=none"]))
    assert "Ways to share a run" in page and "## Targets" not in page
