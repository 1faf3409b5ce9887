"""What cannot run is refused before anything is loaded; which samples a process is handed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from tiny_run import make_base, small
from torch.utils.data import DataLoader, Dataset, SequentialSampler

import e2llm.train.run as run_module
from e2llm.config import Recipe, load_recipe, to_toml
from e2llm.positions.placement import PositionSampler
from e2llm.train import train
from e2llm.train.distributed import Processes, arguments, check, deepspeed_config, devices_left_out
from e2llm.train.sharded import same_run
from e2llm.train.trainer import PlacingCollator


def recipe(*overrides: str) -> Recipe:
    return load_recipe("recommended-yarn", overrides)


def launched(world: int, local: int = 0) -> Processes:
    return Processes(world=world, local_world=local or world, launched=True)


@pytest.mark.parametrize(
    ("overrides", "processes", "gpus", "message"),
    [
        (["distributed.strategy=ddp"], Processes(), 1, "one process was started; start with torchrun"),
        (["distributed.strategy=fsdp2"], Processes(), 0, "'fsdp2': one process was started"),
        ([], launched(2), 2, "'none': 2 processes were started; choose --set distributed.strategy=ddp"),
        (["distributed.strategy=ddp"], launched(16, 8), 4, "8 processes were started on a machine with 4 GPUs"),
        (["distributed.strategy=fsdp2", "distributed.shard=3"], launched(8), 8, "shard = 3: .* 8 processes; .* 2, 4"),
        (["distributed.strategy=fsdp2", "distributed.shard=4"], launched(2), 2, "shard = 4: does not divide the 2"),
        (
            ["distributed.strategy=ddp", "train.batch_size=4", "distributed.global_batch=12"],
            launched(2),
            2,
            "global_batch = 12: not a multiple of train.batch_size x processes = 4 x 2; .* divisor of 6",
        ),
        (["distributed.strategy=deepspeed"], launched(2), 2, r"not installed: pip install 'e2llm\[deepspeed\]'"),
    ],
)
def test_impossible_sections_are_refused(
    overrides: list[str], processes: Processes, gpus: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=message):
        check(recipe(*overrides), processes, gpus, {})


@pytest.mark.parametrize(
    ("processes", "gpus", "told"),
    [
        (Processes(), 0, "sees no CUDA GPU here: training on the CPU"),
        (Processes(), 1, None),
        (Processes(), 8, "8 GPUs are here, 1 of them in use; .* --nproc-per-node 8 .*distributed.strategy=ddp"),
        (launched(2), 4, "4 GPUs are here, 2 of them"),
        (launched(16, 4), 8, "8 GPUs are here, 4 of them"),
        (launched(16, 8), 8, None),
        (Processes(rank=1, world=2, local_rank=1, local_world=2, launched=True), 4, None),
    ],
)
def test_gpus_that_stand_idle_are_named(processes: Processes, gpus: int, told: str | None) -> None:
    found = devices_left_out(processes, gpus)
    assert (found is None) == (told is None) and re.search(told or "", found or "")


def test_a_run_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_base(tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(run_module, "load_model", lambda *args, **options: 1 / 0)
    for quiet in (False, True):
        with pytest.raises(ZeroDivisionError):
            train(small(base, tmp_path / "run"), quiet=quiet)
        assert ("training on the CPU" in capsys.readouterr().err) != quiet


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["distributed.strategy=fsdp"], "choose one of none, ddp, fsdp2, deepspeed"),
        (["distributed.strategy=ddp", "distributed.shard=2"], "shard = 2: says nothing to strategy 'ddp'"),
        (["distributed.strategy=ddp", "distributed.cpu_offload=true"], "strategy 'fsdp2' or 'deepspeed'"),
        (["distributed.strategy=fsdp2", "distributed.shard=1"], "shard = 1: .* is strategy 'ddp'"),
        (["distributed.strategy=deepspeed", "distributed.zero_stage=1"], "choose one of 2, 3"),
        (["distributed.global_batch=8", "train.gradient_accumulation=2"], "follows from distributed.global_batch"),
        (
            ["distributed.strategy=fsdp2", "model.quantization=nf4", "model.dtype=bfloat16", "lora.rank=4"],
            "model.quantization = 'nf4': distributed.strategy = fsdp2 cannot shard 4-bit weights: use ddp",
        ),
        (
            ["distributed.strategy=fsdp2", "model.offload=disk", "lora.rank=4", "train.gradient_checkpointing=true"],
            "model.offload = 'disk': .* distributed.strategy = fsdp2 use distributed.cpu_offload",
        ),
    ],
)
def test_sections_that_contradict_themselves(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(*overrides)


def test_accelerates_own_engine_is_refused() -> None:
    given = {"ACCELERATE_USE_FSDP": "true"}
    with pytest.raises(ValueError, match="accelerate's own configuration asks for FSDP"):
        check(recipe("distributed.strategy=ddp"), launched(2), 2, given)
    check(recipe("distributed.strategy=ddp"), launched(2), 2, {"ACCELERATE_USE_FSDP": "false"})


def test_nothing_is_loaded_before_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "load_model", lambda *args, **options: pytest.fail("weights were loaded"))
    given = small(make_base(tmp_path), tmp_path / "run", "distributed.strategy=fsdp2")
    with pytest.raises(ValueError, match="start with torchrun"):
        train(given, quiet=True)
    assert not (tmp_path / "run").exists()


def test_the_environment_of_a_launcher() -> None:
    found = Processes.of_environment(
        {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "a"}
    )
    assert found == Processes(rank=9, world=16, local_rank=1, local_world=8, launched=True)
    assert Processes.of_environment({"WORLD_SIZE": "4"}) == Processes(), "a cluster's variable alone starts nothing"


@pytest.mark.parametrize(("world", "expected"), [(1, 16), (2, 8), (4, 4), (8, 2)])
def test_accumulation_follows_from_the_global_batch(world: int, expected: int) -> None:
    given = recipe("distributed.strategy=ddp", "train.batch_size=2", "distributed.global_batch=32")
    assert given.accumulation(world) == expected


def test_hybrid_sharding_has_two_dimensions() -> None:
    given = recipe("distributed.strategy=fsdp2", "distributed.shard=8")
    mesh = arguments(given, launched(64, 8))["parallelism_config"]
    assert (mesh.dp_replicate_size, mesh.dp_shard_size) == (8, 8)
    assert "parallelism_config" not in arguments(given, launched(8))


def test_deepspeed_settings() -> None:
    given = recipe("distributed.strategy=deepspeed", "distributed.zero_stage=3", "distributed.cpu_offload=true")
    zero = deepspeed_config(given)["zero_optimization"]
    assert zero["stage"] == 3 and zero["offload_param"]["device"] == zero["offload_optimizer"]["device"] == "cpu"
    assert deepspeed_config(given)["bf16"]["enabled"]
    second = deepspeed_config(recipe("distributed.strategy=deepspeed"))["zero_optimization"]
    assert second["stage"] == 2 and "offload_optimizer" not in second


def test_a_run_may_go_on_spread_otherwise_and_not_changed_otherwise() -> None:
    first = recipe("distributed.strategy=fsdp2", "train.batch_size=4", "distributed.global_batch=16")
    assert same_run(first, recipe("train.batch_size=2", "train.gradient_accumulation=8"))
    assert not same_run(first, recipe("train.batch_size=4", "seed=1"))


def test_the_section_survives_the_recipe_file(tmp_path: Path) -> None:
    given = recipe("distributed.strategy=fsdp2", "distributed.shard=8", "distributed.reshard=false")
    (tmp_path / "recipe.toml").write_text(to_toml(given))
    assert load_recipe(str(tmp_path / "recipe.toml")) == given


class Numbers(Dataset[dict[str, object]]):
    """Sample i is i."""

    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> dict[str, object]:
        return {"input_ids": torch.full((64,), index), "sample_index": index}


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_samples_are_shared_out_without_overlap_or_loss(processes: int) -> None:
    """By the loader that transformers' Trainer uses: in every step the processes share one run of indices."""
    given = recipe()
    sampler = PositionSampler(
        native_window=64, training_window=64, scales=given.scales, placement=given.placement, seed=3
    )
    batch, whole = 2, 16
    accumulated = whole // (batch * processes)
    handed: list[list[list[int]]] = []
    for rank in range(processes):
        loader = DataLoader(Numbers(), batch, sampler=SequentialSampler(Numbers()), collate_fn=PlacingCollator(sampler))
        mine = prepare_data_loader(loader, num_processes=processes, process_index=rank, put_on_device=False)
        batches = []
        for rows in mine:
            indices = rows["input_ids"][:, 0].tolist()
            assert [p.scale for p in rows["placements"]] == [sampler.draw(i, 64).scale for i in indices]
            batches.append(indices)
        handed.append(batches)
    assert {len(batches) for batches in handed} == {3 * accumulated}
    for step in range(3):
        part = slice(step * accumulated, (step + 1) * accumulated)
        found = [index for batches in handed for rows in batches[part] for index in rows]
        assert sorted(found) == list(range(step * whole, (step + 1) * whole))
