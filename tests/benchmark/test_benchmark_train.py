"""The training benchmark at tiny size: real trainers in real processes, what fails, and what is refused."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

import e2llm.benchmark.train as train_module
from e2llm.benchmark.shapes import random_model, shape_of
from e2llm.benchmark.train import TrainBenchConfig, benchmark_train, contestants
from e2llm.benchmark.train_contestants import PLAIN_POSITIONS, Contestant, recipe_of
from e2llm.benchmark.train_process import run_in_process
from e2llm.cli import main
from e2llm.records import Record

QUICK = ("train.compile=none", "train.workers=0")
SMALL = ["--window", "64", "--steps", "4", "--warmup", "1", "--block", "2"]
SET = [word for setting in QUICK for word in ("--set", setting)]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text and tokens, made once."""
    return tmp_path_factory.mktemp("work")


def test_two_trainers_and_a_profile(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, profile = tmp_path / "train.json", tmp_path / "profile.txt"
    given = ["--shape", "tiny-lora", "--trainers", "e2llm", "hf", "hf-liger", "--batch-size", "2", *SMALL, *SET]
    code = main(["benchmark", "train", *given, "--work", str(work), "--profile", str(profile), "--out", str(out)])
    record, said = Record.load(out), capsys.readouterr()
    assert record.kind == "benchmark_train" and record.config["out_of_memory"] == record.config["not_run"] == []
    assert set(record.config["failed"]) <= {"hf-liger 2 x 64"}, record.config["failed"]
    if "hf-liger 2 x 64" in record.config["failed"]:  # not installed, or no GPU for its kernels
        assert code == 1 and "hf-liger 2 x 64 failed" in said.err
    found = {(row["trainer"], row["metric"]): row for row in record.rows}
    for trainer in ("e2llm", "hf"):
        row = found[trainer, "tokens_per_second"]
        assert row["n"] == 2 and row["value"] > 0 and row["low"] <= row["value"] <= row["high"]
        blocks = [e["seconds_per_step"] for e in record.examples if e["trainer"] == trainer and "block" in e]
        assert found[trainer, "seconds_per_step"]["value"] == pytest.approx(sum(blocks) / 2)
    speeds = [found[name, "tokens_per_second"]["value"] for name in ("e2llm", "hf")]
    assert found["e2llm", "ratio_to_hf"]["value"] == pytest.approx(speeds[0] / speeds[1])
    kinds = {row["kernels"] for row in record.rows if row["metric"] == "device_seconds_per_step"}
    assert {"matrix products", "attention forward", "attention backward", "idle"} <= kinds
    assert "matrix products" in profile.read_text() and "aten::mm" in profile.read_text()
    assert "tiny-lora e2llm 2 x 64" in said.out
    ours, theirs = (record.config["trainer_settings"][f"{name} 2 x 64"] for name in ("e2llm", "hf"))
    assert ours["lora"]["rank"] == 4 and ours["placement"]["kind"] == "jumps" and theirs["bf16"] is True
    assert record.config["weights"]["e2llm 2 x 64"] == record.config["weights"]["hf 2 x 64"]
    assert record.environment["torch"], "the environment is the contestants' own"


def test_two_processes_train_together(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "two.json"
    given = ["--shape", "tiny", "--trainers", "e2llm", "hf", "--gpus", "2", "1", "--parallelism", "fsdp2", "tensor"]
    assert main(["benchmark", "train", *given, *SMALL, *SET, "--work", str(work), "--out", str(out)]) == 0
    record = Record.load(out)
    speeds = {
        (row["trainer"], row["gpus"], row["parallelism"]): row["value"]
        for row in record.rows
        if row["metric"] == "tokens_per_second"
    }
    ways = [("e2llm", 2, "fsdp2"), ("e2llm", 2, "tensor")]
    assert speeds.keys() == {("e2llm", 1, "none"), ("hf", 1, "none"), *ways}
    ratios = {row["parallelism"]: row["value"] for row in record.rows if row["metric"] == "ratio_to_one_gpu"}
    for way in ways:
        assert ratios[way[2]] == pytest.approx(speeds[way] / speeds["e2llm", 1, "none"])
        name = f"e2llm 2 x 64 on 2 by {way[2]}"
        shared = record.config["trainer_settings"][name]["distributed"]
        assert (shared["strategy"], shared["tensor_parallel"]) == ("fsdp2", 2 if way[2] == "tensor" else 1)
        assert record.config["weights"][name] == record.config["weights"]["e2llm 2 x 64"], "whole, not a share"


def test_one_of_two_that_fails_ends_both_and_says_why(work: Path) -> None:
    one = Contestant(
        trainer="e2llm", shape="tiny", window=64, batch_size=3, steps=2, warmup=1, gpus=2, parallelism="ddp",
        settings=(*QUICK, "distributed.global_batch=8"),
    )  # fmt: skip
    begin = time.monotonic()
    found = run_in_process(one, work=work, time_limit=120)
    assert found["status"] == "failed" and "distributed.global_batch = 8: not a multiple" in found["why"]
    assert time.monotonic() - begin < 100


def test_a_four_bit_base_is_read_as_users_read_one(work: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    out = tmp_path / "qlora.json"
    given = ["--shape", "tiny-qlora", "--trainers", "e2llm", *SMALL, *SET]
    assert main(["benchmark", "train", *given, "--work", str(work), "--out", str(out)]) == 0
    record, name = Record.load(out), "e2llm 2 x 64"
    assert record.config["trainer_settings"][name]["model"]["quantization"] == "nf4"
    whole = benchmark_train(
        TrainBenchConfig(
            shape="tiny-lora", trainers=("e2llm",), windows=(64,), steps=2, warmup=1, block=1, settings=QUICK
        ),
        work=work,
    )
    assert record.config["weights"] == whole.config["weights"], "a byte of the base holds two weights"
    assert not (work / "run").exists()


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_a_base_that_is_offloaded_is_read_as_users_read_one(work: Path, tmp_path: Path, place: str) -> None:
    out = tmp_path / "offloaded.json"
    given = ["--shape", "tiny-lora", "--trainers", "e2llm", "--checkpointing", *SMALL, *SET, "--set"]
    assert main(["benchmark", "train", *given, f"model.offload={place}", "--work", str(work), "--out", str(out)]) == 0
    record, name = Record.load(out), "e2llm 2 x 64 checkpointing"
    told = record.config["trainer_settings"][name]["model"]
    assert (told["offload"], told["name"]) == (place, "tiny-lora")
    trained, frozen = record.config["weights"][name]
    shape = shape_of("tiny-lora")
    assert frozen == sum(p.numel() for p in random_model(shape, dtype="bfloat16", device="meta").parameters())
    assert 0 < trained < frozen / 10
    assert not (work / "run").exists()


def test_peers_do_not_train_four_bit_shapes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", "train", "--shape", "tiny-qlora", "--trainers", "e2llm", "hf"]) == 2
    assert "trainers = ['hf']: shape 'tiny-qlora' has 4-bit weights; give e2llm alone" in capsys.readouterr().err


def test_figure_1(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "figure1.json"
    given = ["--figure1", "--shape", "tiny", "--full-windows", "256", "512", "--checkpoint-from", "512", *SMALL, *SET]
    assert main(["benchmark", "train", *given, "--work", str(work), "--out", str(out)]) == 0
    record = Record.load(out)
    speeds = [row for row in record.rows if row["metric"] == "tokens_per_second"]
    assert [(r["trainer"], r["window"], r["checkpointing"]) for r in speeds] == [
        ("e2llm", 64, False),
        ("full-length", 256, False),
        ("full-length", 512, True),
    ]
    settings = record.config["trainer_settings"]["full-length 1 x 512 checkpointing"]
    assert settings["scales"]["distribution"] == "fixed" and settings["scales"]["max_scale"] == 4  # 512 / 128
    assert settings["placement"]["kind"] == "none" and settings["train"]["gradient_checkpointing"] is True
    assert {row["serves"] for row in record.rows if "serves" in row} == {"256 512"}


def test_one_that_fails_loses_nothing_of_the_others(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(broken_liger(work)))
    saved: list[dict] = []
    config = TrainBenchConfig(
        shape="tiny", trainers=("hf-liger", "hf"), windows=(64,), batch_sizes=(1,), steps=2, warmup=1, block=1
    )
    record = benchmark_train(config, work=work, save=lambda r: saved.append(dict(r.config["failed"])))
    assert record.config["failed"].keys() == {"hf-liger 1 x 64"}
    assert len(saved) == 2 and saved[0].keys() == {"hf-liger 1 x 64"}, "saved after each"
    assert {row["trainer"] for row in record.rows} == {"hf"}


def broken_liger(folder: Path) -> Path:
    """An installed package of that name which cannot be imported."""
    site = folder / "site"
    (site / "liger_kernel-0.8.0.dist-info").mkdir(parents=True, exist_ok=True)
    (site / "liger_kernel-0.8.0.dist-info" / "METADATA").write_text("Name: liger-kernel\nVersion: 0.8.0\n")
    (site / "liger_kernel").mkdir(exist_ok=True)
    (site / "liger_kernel" / "__init__.py").write_text("raise RuntimeError('broken on purpose')\n")
    return site


def one_of(trainer: str = "hf", **changes: object) -> Contestant:
    sizes = {"shape": "tiny", "window": 64, "batch_size": 1, "steps": 2, "warmup": 1, "block": 1}
    return Contestant(trainer=trainer, **{**sizes, **changes})  # type: ignore[arg-type]


def test_a_process_that_takes_too_long_is_ended_with_its_children(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site, mark = work / "slow", f"100.{os.getpid()}"
    site.mkdir(exist_ok=True)
    code = (
        f"import subprocess, time\nsubprocess.Popen(['sleep', '{mark}'])\nprint('begun', flush=True)\ntime.sleep(100)\n"
    )
    (site / "sitecustomize.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(site))
    found = run_in_process(one_of(), work=work, time_limit=2)
    assert found == {"status": "too long", "why": "took longer than 2 s; it said last: begun"}
    assert (work / "log.txt").read_text() == "begun\n"
    time.sleep(0.2)  # a process that was killed may be seen for a moment
    assert not [p for p in Path("/proc").glob("[0-9]*") if mark in command_line(p)], "nothing of it is left"


def command_line(process: Path) -> str:
    try:
        return (process / "cmdline").read_text()
    except OSError:
        return ""


def test_a_process_that_dies_says_why(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = work / "dies"
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text("import os\nos.write(2, b'gone before it began\\n')\nos._exit(3)\n")
    monkeypatch.setenv("PYTHONPATH", str(site))
    found = run_in_process(one_of(), work=work, time_limit=60)
    assert found == {"status": "failed", "why": "exit code 3: gone before it began"}


class Results:
    """In the place of processes: what each contestant is said to have found."""

    def __init__(self, out_of_memory: set[str], seconds: float = 0.0) -> None:
        self.out_of_memory, self.seconds, self.asked = out_of_memory, seconds, []

    def __call__(self, one: Contestant, *, work: Path, time_limit: float) -> dict:
        self.asked.append(one.name)
        time.sleep(self.seconds)
        if one.name in self.out_of_memory:
            return {"status": "out of memory", "why": ""}
        result = {"seconds": [1.0] * one.steps, "peak_memory_bytes": 1, "warm_after_seconds": 1.0, "device": "cpu"}
        return {
            "status": "measured",
            **result,
            "settings": {},
            "environment": {},
            "kernels": [],
            "gaps": [],
            "trained": 1,
            "frozen": 0,
        }


def test_what_does_not_fit_is_no_failure_and_larger_ones_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    results = Results({"hf 4 x 64"})
    monkeypatch.setattr(train_module, "run_in_process", results)
    trainers = ("hf", "e2llm")
    config = TrainBenchConfig(shape="tiny", trainers=trainers, windows=(64,), batch_sizes=(8, 2, 4), rounds=2)
    record = benchmark_train(config)
    assert record.config["out_of_memory"] == ["hf 4 x 64", "hf 8 x 64"] and record.config["failed"] == {}
    assert [name for name in results.asked if name.startswith("hf")] == ["hf 2 x 64", "hf 4 x 64", "hf 2 x 64"]
    assert {row["n"] for row in record.rows if row["metric"] == "ratio_to_hf"} == {2}


def test_full_length_that_does_not_fit_is_tried_with_activations_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    results = Results({"full-length 1 x 256"})
    monkeypatch.setattr(train_module, "run_in_process", results)
    config = TrainBenchConfig(shape="tiny", figure1=True, windows=(64,), full_windows=(128, 256, 512))
    record = benchmark_train(config)
    assert results.asked == [
        "e2llm 1 x 64",
        "full-length 1 x 128",
        "full-length 1 x 256",
        "full-length 1 x 256 checkpointing",
        "full-length 1 x 512 checkpointing",
    ]
    assert record.config["out_of_memory"] == ["full-length 1 x 256", "full-length 1 x 512"]


def test_time_that_is_up_names_who_did_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_module, "run_in_process", Results(set(), seconds=0.3))
    config = TrainBenchConfig(shape="tiny", trainers=("hf", "e2llm", "litgpt"), windows=(64,), until=0.2)
    assert benchmark_train(config).config["not_run"] == ["e2llm 2 x 64", "litgpt 2 x 64"]


def test_steps_of_long_windows_cover_as_many_tokens() -> None:
    config = TrainBenchConfig(shape="llama-2-7b-lora", figure1=True, windows=(4096, 8192), checkpoint_from=32_768)
    found = [(one.window, one.steps, one.warmup, one.block, one.checkpointing) for one in contestants(config)]
    assert found[:4] == [
        (4096, 20, 8, 5, False),
        (8192, 10, 4, 2, False),
        (16_384, 5, 2, 1, False),
        (32_768, 2, 1, 1, True),
    ]
    assert found[5] == (131_072, 2, 1, 1, True)


def test_plain_positions_differ_in_scales_and_placement_alone(tmp_path: Path) -> None:
    ours, plain = (recipe_of(one_of(trainer), tmp_path, tmp_path) for trainer in ("e2llm", PLAIN_POSITIONS))
    assert (plain.scales.distribution, plain.scales.max_scale, plain.placement.kind) == ("fixed", 1, "none")
    assert (ours.scales.distribution, ours.placement.kind, ours.train) == ("weighted", "jumps", plain.train)
    assert ours.train.compile == "layers"


@pytest.mark.gpu
def test_on_a_gpu_there_are_kernels_and_utilization(work: Path) -> None:
    sizes = {"windows": (256,), "batch_sizes": (4,), "steps": 4, "warmup": 3, "block": 2}
    record = benchmark_train(TrainBenchConfig(shape="tiny", trainers=("e2llm", "hf"), profile=True, **sizes), work=work)
    assert record.config["failed"] == {} and "gpu" in record.environment
    found = {(row["trainer"], row["metric"]): row["value"] for row in record.rows}
    for trainer in ("e2llm", "hf"):
        assert 0 < found[trainer, "model_flops_utilization"] < 1
        assert 1e6 < found[trainer, "peak_memory_bytes"] < 1e9
    kernels = [example["kernel"] for example in record.examples if "kernel" in example]
    assert kernels and not any(name.startswith(("aten::", "Optimizer.")) for name in kernels)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (["--shape", "llama-2"], "shape = 'llama-2': no such shape"),
        (["--trainers", "hff"], "trainers = 'hff': no such trainer"),
        (["--trainers", "hf:0"], "write batch sizes of at least 1 as hf:1,2"),
        (["--trainers", "hf", "hf"], "each contestant once"),
        (["--batch-size", "0"], "batch_sizes = [0]: use numbers of at least 1"),
        (["--steps", "0"], "steps = 0: use at least 1"),
        (["--block", "30"], "block = 30: more than steps = 20"),
        (["--window", "4q"], "tokens = '4q': write a number as 4096 or 32k"),
        (["--window"], "give at least one of each"),
        (["--method", "yarm"], "method = 'yarm'"),
        (["--set", "train.compil=none"], "did you mean train.compile"),
        (["--until", "0"], "use seconds above 0"),
        (["--trainers", "hf", "--profile", "p.txt"], "profile: e2llm is the one that is profiled"),
    ],
)
def test_what_is_refused(
    wrong: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_module, "run_in_process", lambda *a, **k: pytest.fail("nothing may run"))
    shape = [] if "--shape" in wrong else ["--shape", "tiny"]
    assert main(["benchmark", "train", *shape, *wrong, "--out", str(tmp_path / "out.json")]) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


def test_contestants_are_given_as_many_gpus_as_they_ask_for(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from e2llm.benchmark import train_process

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert train_process._environment(work, 1)["CUDA_VISIBLE_DEVICES"] == "3"
    assert train_process._environment(work, 2)["CUDA_VISIBLE_DEVICES"] == "3,5"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert train_process._environment(work, 1)["CUDA_VISIBLE_DEVICES"] == "0"
