"""Several processes: each way to spread a run gives what one process gives, from the same samples, and resumes on
another number of processes. Real processes: gloo on the CPU, NCCL where there are two GPUs."""

from __future__ import annotations

import importlib.util
import json
import socket
import warnings
from pathlib import Path

import pytest
import torch
from processes import placement_key, run, seen, seen_file, torchrun
from tiny_run import WINDOW, logged, make_base, small, weights, write
from transformers import AutoConfig, AutoModelForCausalLM

from e2llm.config import Recipe
from e2llm.positions.placement import PositionSampler
from e2llm.train import train
from e2llm.train.distributed import leave

pytestmark = pytest.mark.skipif(torch.cuda.device_count() == 1, reason="two processes need two GPUs, or none")

# float32 sums in another order; GPUs also choose other kernels, and Adam divides by small numbers
LOSS, WEIGHT = (1e-4, 1e-4) if torch.cuda.is_available() else (1e-5, 1e-7)
BATCH = (
    *("train.batch_size=2", "distributed.global_batch=8", "train.save_every=3", "train.evaluate_every=3"),
    "train.evaluate_windows=5",  # processes have unlike numbers of them
)
LORA = ("lora.rank=4", "lora.train_norms=true", "train.learning_rate=1e-2")
TIGHT = (
    *("train.logits_tokens=16", "train.max_grad_norm=0.05", "train.gradient_checkpointing=true"),
    "placement.far_weight=0.5",
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def runs(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process as pytest is; two processes; a run of two, stopped at step 3, that one process ended."""
    folder = tmp_path_factory.mktemp("runs")
    train(small(base, folder / "full", *BATCH, *TIGHT), quiet=True)
    kinds = ("ddp", "fsdp2")
    names = {kind: write(base, folder, kind, *BATCH, *TIGHT, f"distributed.strategy={kind}") for kind in kinds}
    stopped = write(base, folder, "two-to-one", *BATCH, *TIGHT, "distributed.strategy=fsdp2")
    torchrun(2, *names.values(), f"{stopped}:3")
    assert sorted(seen(Path(stopped), 2)) == [1, 2, 3]
    alone(stopped)
    return folder


@pytest.fixture(scope="module")
def slow_runs(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters, and the other ways to go on with another number of processes."""
    folder = tmp_path_factory.mktemp("slow")
    for name, more in (("full", TIGHT), ("lora", LORA)):
        train(small(base, folder / name, *BATCH, *more), quiet=True)
    adapters = write(base, folder, "fsdp2-lora", *BATCH, *LORA, "distributed.strategy=fsdp2")
    two_to_one = write(base, folder, "ddp-two-to-one", *BATCH, *TIGHT, "distributed.strategy=ddp")
    one_to_two = write(base, folder, "one-to-two", *BATCH, *TIGHT, "distributed.strategy=fsdp2")
    torchrun(2, adapters, f"{two_to_one}:3")
    torchrun(1, two_to_one, f"{one_to_two}:3")
    torchrun(2, one_to_two)
    return folder


def alone(recipe: str) -> None:
    """Go on in this process, as torchrun's only one."""
    with socket.socket() as free, pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        free.bind(("127.0.0.1", 0))
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        where |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        for name, value in where.items():
            patch.setenv(name, value)
        free.close()
        run(Path(recipe), None)
        leave()


ALL = ["ddp", "fsdp2", "two-to-one"]
SLOW = ["fsdp2-lora", "ddp-two-to-one", "one-to-two"]


def check_same_run(runs: Path, name: str) -> None:
    reference = "lora" if "lora" in name else "full"
    for key in ("loss", "grad_norm", "eval_loss_scale_1", "eval_loss_scale_4"):
        found, expected = logged(runs / name, key), logged(runs / reference, key)
        assert found.keys() == expected.keys() and len(expected) == (2 if "eval" in key else 6)
        for step, value in expected.items():
            assert abs(found[step] - value) < LOSS, f"{name}: {key} at step {step}"
    for folder in ("model", "best"):
        ours, theirs = weights(runs / name / folder), weights(runs / reference / folder)
        assert ours.keys() == theirs.keys()
        for key, weight in theirs.items():
            assert float((ours[key] - weight).abs().max()) < WEIGHT, f"{name}: {key}"


def check_samples(base: Path, runs: Path, name: str) -> None:
    recipe = small(base, runs / name)
    sampler = PositionSampler(
        native_window=64, training_window=WINDOW, scales=recipe.scales, placement=recipe.placement, seed=recipe.seed
    )
    steps = {step: range(8 * (step - 1), 8 * step) for step in range(1, 7)}
    drawn = {step: sorted(placement_key(sampler.draw(index)) for index in steps[step]) for step in steps}
    assert seen(runs / f"{name}.toml", 2) == drawn


@pytest.mark.parametrize("name", ALL)
def test_any_number_of_processes_gives_the_same_run(runs: Path, name: str) -> None:
    check_same_run(runs, name)


@pytest.mark.parametrize("name", ALL)
def test_every_sample_arrives_once_with_its_own_draw(base: Path, runs: Path, name: str) -> None:
    check_samples(base, runs, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_adapters_and_other_changes_of_processes(base: Path, slow_runs: Path, name: str) -> None:
    check_same_run(slow_runs, name)
    check_samples(base, slow_runs, name)
    adapter = slow_runs / name / "adapter" / "adapter_model.safetensors"
    assert adapter.is_file() == (name == "fsdp2-lora")


@pytest.mark.slow
def test_layers_that_are_compiled_and_recomputed(base: Path, tmp_path: Path) -> None:
    """As the fast runs on GPUs have them; fused sums are rounded otherwise."""
    train(small(base, tmp_path / "full", *BATCH, *TIGHT), quiet=True)
    fused = (*BATCH, *TIGHT, "train.compile=layers")
    kinds = ("ddp", "fsdp2")
    torchrun(2, *(write(base, tmp_path, kind, *fused, f"distributed.strategy={kind}") for kind in kinds))
    for kind in kinds:
        check_samples(base, tmp_path, kind)
        for key in ("loss", "grad_norm"):
            expected = logged(tmp_path / "full", key)
            assert len(expected) == 6 and logged(tmp_path / kind, key) == pytest.approx(expected, rel=1e-4), kind


@pytest.mark.slow
@pytest.mark.parametrize("kind_of_model", ["llama", "glm"])
def test_groups_are_those_of_one_process(kind_of_model: str, tmp_path: Path) -> None:
    """Under fsdp2 the first process says how the model pairs channels: the others have no weights to try it with."""
    (tmp_path / "base").mkdir()
    base = make_base(tmp_path / "base")
    if kind_of_model == "glm":  # neighbouring channels are a pair
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 300, "head_dim": 16}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
        config = AutoConfig.for_model("glm", **sizes, **heads, pad_token_id=0, eos_token_id=0)
        AutoModelForCausalLM.from_config(config).save_pretrained(base / "model")
    grouped = (*BATCH, *TIGHT, "method=self_extend", "attention.slope=0", "placement.max_jumps=3")
    train(small(base, tmp_path / "full", *grouped), quiet=True)
    kinds = ("ddp", "fsdp2")
    torchrun(2, *(write(base, tmp_path, kind, *grouped, f"distributed.strategy={kind}") for kind in kinds))
    for kind in kinds:
        check_same_run(tmp_path, kind)
    train(small(base, tmp_path / "plain", *BATCH, *TIGHT, "placement.max_jumps=3"), quiet=True)
    assert logged(tmp_path / "plain", "loss") != logged(tmp_path / "full", "loss")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="pip install 'e2llm[deepspeed]'")
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_gives_the_same_run_and_resumes(base: Path, tmp_path: Path, stage: int) -> None:
    train(small(base, tmp_path / "full", *BATCH, *TIGHT), quiet=True)
    zero = ("distributed.strategy=deepspeed", f"distributed.zero_stage={stage}")
    file = write(base, tmp_path, "zero", *BATCH, *TIGHT, *zero)
    torchrun(2, f"{file}:3")
    torchrun(2, file)
    check_same_run(tmp_path, "zero")
    check_samples(base, tmp_path, "zero")


def test_fsdp2_holds_half_of_the_weights_in_each_process(runs: Path) -> None:
    def held(name: str, line: int = 0) -> int:
        return int(json.loads(seen_file(runs / f"{name}.toml", 0).read_text().splitlines()[line])["numbers_held"])

    assert held("fsdp2") == held("two-to-one") == held("ddp") // 2
    assert held("two-to-one", -1) == held("ddp"), "one process holds all"


def test_under_fsdp2_the_first_process_alone_reads_weights(base: Path, runs: Path) -> None:
    def loaded(name: str, rank: int) -> dict:
        found: dict = json.loads((runs / f"{name}.loaded{rank}.json").read_text())
        return found

    whole = sum(w.nbytes for w in weights(base / "model").values())
    assert loaded("fsdp2", 0)["read"] >= whole > 100 * loaded("fsdp2", 1)["read"]
    assert all(loaded("ddp", rank)["read"] >= whole for rank in (0, 1))
    tables = loaded("fsdp2", 0)["buffers"]
    assert tables and tables == loaded("fsdp2", 1)["buffers"] == loaded("ddp", 1)["buffers"]


def test_the_folder_at_the_end_loads_without_us(runs: Path) -> None:
    found = AutoModelForCausalLM.from_pretrained(runs / "fsdp2" / "model")
    expected = AutoModelForCausalLM.from_pretrained(runs / "full" / "model")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(found(ids).logits, expected(ids).logits, atol=1e-5, rtol=1e-5)


def test_metrics_and_record_are_written_once(runs: Path) -> None:
    lines = (runs / "fsdp2" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if '"grad_norm"' in line] == [1, 2, 3, 4, 5, 6]
    assert (runs / "fsdp2" / "train.json").is_file()


def test_another_global_batch_or_another_engine_is_not_resumed(base: Path, runs: Path) -> None:
    def other(*more: str) -> Recipe:
        return small(base, runs / "full", *BATCH[2:], *TIGHT, *more)

    with pytest.raises(ValueError, match=r"takes 4 windows, .*steps of 8: set distributed.global_batch=8"):
        train(other("train.batch_size=4"), resume=True, quiet=True)
    sharded = small(base, runs / "fsdp2", *BATCH, *TIGHT)
    with pytest.raises(ValueError, match=r"'none': .* was written by strategy 'fsdp2'"):
        train(sharded, resume=True, quiet=True)
    assert train(other("train.batch_size=8"), resume=True, quiet=True).steps == 6
