"""Whether a run fits its GPU is told before its weights are read."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from tiny_run import make_base, small
from transformers import AutoConfig

import e2llm.train.run as run
from e2llm.config import Recipe, load_recipe
from e2llm.plan.memory import training_memory
from e2llm.plan.shape import shape_of
from e2llm.train import train
from e2llm.train.distributed import Processes
from e2llm.train.memory import check_memory
from e2llm.train.sharded import same_run

FIRST_OF_FOUR = Processes(world=4, local_world=4, launched=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


class Card:
    """A GPU, as far as the check asks for it."""

    size = 0.0


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, int(Card.size)))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Card 9000")
    return Card()


def needed(recipe: Recipe, gpus: int = 1) -> float:
    shape = shape_of(AutoConfig.from_pretrained(recipe.model.name))
    return sum(training_memory(shape, recipe, gpus).values())


def test_a_run_that_does_not_fit_is_refused_before_weights_are_read(
    base: Path, tmp_path: Path, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "load_model", lambda *args, **options: pytest.fail("weights were read"))
    recipe = small(base, tmp_path / "run", "train.batch_size=8")
    Card.size = needed(recipe) / 3
    with pytest.raises(ValueError, match=r"needs .* GB on the GPU, .* and Card 9000 has .* GB") as caught:
        train(recipe, quiet=True)
    first, *rest = str(caught.value).splitlines()
    assert first.startswith("model.name = ") and "--set train.check_memory=false" in first
    assert f"needs {needed(recipe) / 1e9:.1f} GB" in first
    assert rest[0] == "what would fit:"
    assert rest[1].endswith("--set train.batch_size=1 --set train.gradient_accumulation=8")
    assert not (tmp_path / "run").exists(), "a run with other settings can take this folder"


@pytest.mark.parametrize(
    ("share", "told"),
    [(1.10, ""), (1.02, "may not fit"), (0.92, "may not fit"), (0.89, "refused"), (0.5, "refused")],
)
def test_the_prediction_may_be_wrong_by_a_tenth(
    base: Path, tmp_path: Path, card: Card, caplog: pytest.LogCaptureFixture, share: float, told: str
) -> None:
    recipe = small(base, tmp_path)
    Card.size = share * needed(recipe)
    if told == "refused":
        with pytest.raises(ValueError, match="needs"):
            check_memory(recipe, Processes())
        check_memory(small(base, tmp_path, "train.check_memory=false"), Processes())
        told = "may not fit"
    else:
        check_memory(recipe, Processes())
    assert bool(caplog.records) == bool(told) and told in caplog.text


def test_each_process_counts_its_share(base: Path, tmp_path: Path, card: Card) -> None:
    short = ("data.window=8", "placement.max_jumps=1", "train.batch_size=1", "train.logits_tokens=1")
    recipe = small(base, tmp_path, "distributed.strategy=fsdp2", *short)  # weights are most of it
    Card.size = 1.06 * needed(recipe, 4)
    assert needed(recipe) > 1.2 * Card.size
    check_memory(recipe, FIRST_OF_FOUR)
    Card.size = needed(recipe, 4) / 2
    with pytest.raises(ValueError, match="on each of 4 GPUs"):
        check_memory(recipe, FIRST_OF_FOUR)


def test_one_process_speaks_for_all(
    base: Path, tmp_path: Path, card: Card, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = small(base, tmp_path, "distributed.strategy=ddp")
    Card.size = needed(recipe, 2)
    check_memory(recipe, Processes(rank=1, world=2, local_rank=1, local_world=2, launched=True))
    assert not caplog.records
    check_memory(recipe, Processes(rank=0, world=2, local_world=2, launched=True))
    assert len(caplog.records) == 1 and caplog.records[0].levelno == logging.WARNING


def test_where_nothing_smaller_fits(base: Path, tmp_path: Path, card: Card) -> None:
    Card.size = 1e3
    with pytest.raises(ValueError, match=r"nothing smaller fits this GPU: .* shorter data\.window"):
        check_memory(small(base, tmp_path), Processes())


def test_a_base_that_cannot_be_counted_is_named(
    base: Path, tmp_path: Path, card: Card, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    Card.size = 1e3
    config = AutoConfig.from_pretrained(base / "model")
    config.quantization_config = {"quant_method": "awq"}
    monkeypatch.setattr("e2llm.train.memory.load_config", lambda *args, **options: config)
    check_memory(small(base, tmp_path), Processes())
    assert "memory is not predicted, its weights are quantized" in caplog.text
    del config.quantization_config
    monkeypatch.setattr("e2llm.train.memory.shape_of", lambda *args, **options: torch.empty(1, device="meta").item())
    check_memory(small(base, tmp_path), Processes())
    assert "memory is not predicted: " in caplog.text.splitlines()[-1]
    shared = small(base, tmp_path, "distributed.strategy=fsdp2", "distributed.tensor_parallel=2")
    check_memory(shared, FIRST_OF_FOUR)
    assert "tensor_parallel = 2: memory is not predicted" in caplog.text


def test_nothing_is_asked_without_a_gpu(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("e2llm.train.memory.load_config", lambda *args, **options: pytest.fail("a config was read"))
    check_memory(small(base, tmp_path), Processes())


def test_a_run_may_go_on_unchecked() -> None:
    assert same_run(load_recipe("recommended"), load_recipe("recommended", ["train.check_memory=false"]))
