"""Ways to share a run that the training benchmark sets beside each other, and calls that go on from earlier ones."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import e2llm.benchmark.train as train_module
from e2llm.benchmark.train import TrainBenchConfig, benchmark_train
from e2llm.benchmark.train_contestants import PARALLELISM, Contestant, recipe_of, require_package
from e2llm.benchmark.train_rows import tokens_per_step
from e2llm.benchmark.trainers import _counts
from e2llm.cli import main
from e2llm.config_distributed import DistributedConfig
from e2llm.records import Record

SIZES: dict[str, Any] = {"shape": "tiny", "window": 64, "batch_size": 3, "steps": 2, "warmup": 1, "block": 1}


def contestant(way: str, gpus: int) -> Contestant:
    return Contestant(trainer="e2llm", gpus=gpus, parallelism=way, **SIZES)


@pytest.mark.parametrize(
    ("way", "section"),
    {
        "ddp": DistributedConfig(strategy="ddp"),
        "fsdp2": DistributedConfig(strategy="fsdp2"),
        "hsdp": DistributedConfig(strategy="fsdp2", shard=2),
        "tensor": DistributedConfig(strategy="fsdp2", tensor_parallel=2),
        "fsdp2-offload": DistributedConfig(strategy="fsdp2", cpu_offload=True),
        "deepspeed": DistributedConfig(strategy="deepspeed", zero_stage=2),
        "zero3": DistributedConfig(strategy="deepspeed", zero_stage=3),
        "zero3-offload": DistributedConfig(strategy="deepspeed", zero_stage=3, cpu_offload=True),
    }.items(),
)
def test_each_way_is_a_section_of_the_recipe(way: str, section: DistributedConfig, tmp_path: Path) -> None:
    one = contestant(way, 4)
    assert recipe_of(one, tmp_path, tmp_path).distributed == section
    # Two that compute a layer together see the same windows: their tokens count once.
    assert tokens_per_step(one) == 64 * 3 * (2 if way == "tensor" else 4)


def test_all_are_tested_and_one_gpu_has_none() -> None:
    assert len(PARALLELISM) == 8
    one = Contestant(trainer="e2llm", **SIZES)
    assert recipe_of(one, Path("text"), Path("work")).distributed == DistributedConfig()
    assert tokens_per_step(one) == 64 * 3


@pytest.mark.parametrize(
    ("way", "gpus", "named"),
    [
        ("hsdp", 2, "parallelism = 'hsdp': not for gpus = 2; it takes 4 or more, a multiple of 2"),
        ("tensor", 3, "parallelism = 'tensor': not for gpus = 3; it takes 2 or more, a multiple of 2"),
        ("zero2", 2, "parallelism = 'zero2': no such way; choose from ddp, fsdp2, hsdp"),
    ],
)
def test_what_so_many_gpus_cannot_take_is_refused(way: str, gpus: int, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        TrainBenchConfig(shape="tiny", trainers=("e2llm",), gpus=(1, gpus), parallelism=(way,))


def test_a_missing_engine_is_told_before_a_process_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise train_contestants.importlib.metadata.PackageNotFoundError(name)

    from e2llm.benchmark import train_contestants

    monkeypatch.setattr(train_contestants.importlib.metadata, "version", version)
    require_package(contestant("fsdp2", 2))
    with pytest.raises(ModuleNotFoundError, match="parallelism = 'zero3' needs a package: pip install deepspeed"):
        require_package(contestant("zero3", 2))


def test_weights_that_are_not_gathered_are_counted() -> None:
    """ZeRO-3 leaves parameters empty, and says how large they are."""
    model = nn.Linear(4, 6)
    whole = _counts(model)
    for parameter in model.parameters():
        parameter.ds_numel = parameter.numel()  # type: ignore[attr-defined]
        parameter.data = torch.empty(0)
    assert _counts(model) == whole == {"trained": 30, "frozen": 0}


class Results:
    """In the place of processes: `say` is what the next ones find."""

    def __init__(self, **say: Any) -> None:
        self.say, self.asked = say, list[str]()

    def __call__(self, one: Contestant, *, work: Path, time_limit: float) -> dict[str, Any]:
        self.asked.append(one.name)
        measured = {"seconds": [1.0] * one.steps, "peak_memory_bytes": 1, "warm_after_seconds": 1.0, "device": "cpu"}
        measured |= {"settings": {}, "kernels": [], "gaps": [], "trained": 1, "frozen": 0}
        measured |= {"status": "measured", "environment": {"gpu": "G", "gpus": one.gpus}}
        return self.say.get(one.trainer) or measured


def test_a_later_call_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured, did not fit or failed by an error is not run again; what had no time or no package is."""
    here = {"environment": {"gpu": "G"}}
    first = Results(
        hf={"status": "failed", "why": "broken", **here},
        litgpt={"status": "failed", "why": "needs a package"},
        unsloth={"status": "out of memory", "why": "", **here},
        **{"hf-liger": {"status": "too long", "why": "took longer"}},
    )
    trainers = ("e2llm", "hf", "litgpt", "unsloth", "hf-liger")
    common: dict[str, Any] = {"shape": "tiny", "trainers": trainers, "windows": (64,), "steps": 2, "block": 1}
    monkeypatch.setattr(train_module, "run_in_process", first)
    before = benchmark_train(TrainBenchConfig(**common), work=tmp_path)
    again = Results()
    monkeypatch.setattr(train_module, "run_in_process", again)
    after = benchmark_train(TrainBenchConfig(**common, resume=True), work=tmp_path)
    assert again.asked == ["litgpt 2 x 64", "hf-liger 2 x 64"]
    assert after.config["failed"] == {"hf 2 x 64": "broken"} and after.config["out_of_memory"] == ["unsloth 2 x 64"]
    assert [row for row in after.rows if row["trainer"] == "e2llm" and "peer" not in row] == before.rows
    changed = TrainBenchConfig(**{**common, "settings": ("train.workers=0",)}, resume=True)
    benchmark_train(changed, work=tmp_path)
    assert len(again.asked) == 2 + len(trainers), "other settings are another run"


def test_kept_results_cost_no_time_and_a_call_without_resume_takes_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = Results()
    monkeypatch.setattr(train_module, "run_in_process", results)
    common: dict[str, Any] = {"shape": "tiny", "trainers": ("e2llm",), "windows": (64,), "steps": 2, "block": 1}
    for resume, asked in ((False, 1), (True, 1), (False, 2)):
        late = {"until": 1e-9} if resume else {}
        record = benchmark_train(TrainBenchConfig(**common, **late, resume=resume), work=tmp_path)
        assert len(results.asked) == asked and record.rows and not record.config["not_run"]


def test_results_of_another_gpu_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    common: dict[str, Any] = {"shape": "tiny", "windows": (64,), "steps": 2, "block": 1}
    monkeypatch.setattr(train_module, "run_in_process", Results())
    benchmark_train(TrainBenchConfig(**common, trainers=("e2llm",)), work=tmp_path)
    other = {"status": "failed", "why": "", "environment": {"gpu": "H"}}
    monkeypatch.setattr(train_module, "run_in_process", Results(hf=other))
    with pytest.raises(ValueError, match=r"hf 2 x 64 was measured on H, others on G; remove .*measured"):
        benchmark_train(TrainBenchConfig(**common, trainers=("e2llm", "hf"), resume=True), work=tmp_path)


@pytest.mark.parametrize("trainers", [("e2llm",), ("e2llm", "hf")])
def test_a_record_counts_the_gpus_that_were_used(
    trainers: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each process sees its own alone, and those of one GPU come first."""
    monkeypatch.setattr(train_module, "run_in_process", Results())
    common: dict[str, Any] = {"shape": "tiny", "windows": (64,), "steps": 2, "block": 1, "trainers": trainers}
    for gpus in ((1,), (2, 1)):
        record = benchmark_train(TrainBenchConfig(**common, gpus=gpus), work=tmp_path)
        assert record.environment == {"gpu": "G", "gpus": max(gpus)}


def test_more_gpus_than_are_here_are_refused_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr(train_module, "_Session", lambda *args: pytest.fail("begun"))
    with pytest.raises(ValueError, match=r"gpus = \[1, 4\]: GPUs here: 2; leave out what is more"):
        benchmark_train(TrainBenchConfig(shape="tiny", gpus=(1, 4)))


def test_resume_needs_the_folder_of_the_earlier_call(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    assert main(["benchmark", "train", "--shape", "tiny", "--resume", "--out", str(out)]) == 2
    assert "resume: what was measured lies in the folder of the earlier call" in capsys.readouterr().err


def test_the_plan_is_not_held_against_what_it_does_not_cover(monkeypatch: pytest.MonkeyPatch) -> None:
    from scripts_of import load_script

    plan_records = load_script(Path(__file__).parents[2] / "scripts" / "plan_records.py")
    rows = []
    for way in PARALLELISM:
        labels = {"trainer": "e2llm", "shape": "llama-1b", "window": 4096, "batch_size": 8, "checkpointing": False}
        labels |= {"gpus": 4, "parallelism": way}
        rows += [
            {"metric": "tokens_per_second", "value": 2e5, "unit": "tokens/s", "n": 1, **labels},
            {"metric": "peak_memory_bytes", "value": 6e10, "unit": "bytes", "n": 1, **labels},
        ]
    config = {"settings": ["train.optimizer=adamw"]}
    runs = plan_records.runs_of(Record("benchmark_train", config, rows, environment={"gpu": "NVIDIA H200"}), "x")
    shared = [(run.recipe.distributed.strategy, run.recipe.distributed.shard) for run in runs]
    assert shared == [("ddp", 0), ("fsdp2", 0), ("fsdp2", 2)]
    config = {"settings": ["train.compile=none"]}
    uncompiled = SimpleNamespace(config=config, rows=rows, environment={"gpu": "NVIDIA H200"})
    assert plan_records.runs_of(uncompiled, "x") == []
