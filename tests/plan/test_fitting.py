"""What is said to fit: recipes that parse, counted as the plan counts them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from architectures import tiny_config, tiny_model

from e2llm.benchmark.shapes import SHAPES
from e2llm.cli import main
from e2llm.config import Recipe, load_recipe
from e2llm.hf import install
from e2llm.hf.offload import offload_frozen
from e2llm.plan.fitting import alternatives, fits
from e2llm.plan.memory import offloaded_bytes, training_memory
from e2llm.plan.shape import shape_of
from e2llm.plan.speed import GPUS
from e2llm.plan.step import step_of

SEVEN = "llama-2-7b"
OFFLOADED = ("model.dtype=bfloat16", "lora.rank=16", "train.batch_size=1", "train.gradient_checkpointing=true")


def recipe(*overrides: str) -> Recipe:
    return load_recipe("recommended-yarn", overrides)


@pytest.mark.parametrize(
    ("settings", "gigabytes"),
    [((), 24), ((), 12), (("distributed.strategy=ddp", "distributed.global_batch=8"), 24), (("lora.rank=8",), 48)],
)
def test_each_is_a_recipe_of_that_size(settings: tuple[str, ...], gigabytes: int) -> None:
    shape = shape_of(SHAPES[SEVEN].config())
    found = alternatives(shape, recipe(*settings), gigabytes * 1e9)
    assert found
    for way in found:
        made = recipe(*settings, *way.settings)
        assert sum(training_memory(shape, made).values()) == way.size and fits(way.size, gigabytes * 1e9)
        windows = made.train.batch_size * made.train.gradient_accumulation
        assert made.distributed.global_batch or windows == recipe(*settings).train.batch_size
    offered = [" ".join(way.settings) for way in found]
    assert any("nf4" in text for text in offered)
    assert any("offload" in text for text in offered) == ("distributed.strategy=ddp" not in settings)


def test_the_mildest_comes_first_and_what_is_set_already_is_not_said_again() -> None:
    shape = shape_of(SHAPES["llama-1b"].config())
    base = recipe("train.batch_size=64", "train.gradient_checkpointing=true")
    first = alternatives(shape, base, 80e9)[0]
    assert first.settings == ("train.batch_size=1", "train.gradient_accumulation=64")
    assert alternatives(shape_of(SHAPES[SEVEN].config()), recipe(), 1e9) == []


def test_documents_are_offered_an_attention_without_masks() -> None:
    shape = shape_of(SHAPES["smollm2-135m"].config())
    given = ("data.document_mask=true", "train.compile=layers", "train.batch_size=8")
    assert not fits(sum(training_memory(shape, recipe(*given)).values()), 32e9)
    flex = "model.attn_implementation=flex_attention"
    first, *_ = alternatives(shape, recipe(*given), 32e9)
    assert first.settings == (flex, "placement.far_weight=0.0")
    assert first.size == sum(training_memory(shape, recipe(*given, *first.settings)).values())
    first, *_ = alternatives(shape, recipe(*given, "placement.far_weight=0"), 32e9)
    assert first.settings == (flex,)
    for plain in (("data.document_mask=false",), (flex, "placement.far_weight=0")):
        ways = alternatives(shape, recipe(*given, *plain), 16e9)
        assert ways and not any("attn_implementation" in text for way in ways for text in way.settings)


def test_offloaded_bytes_are_those_that_are_offloaded(tmp_path: Path) -> None:
    model = tiny_model("llama")
    install(model)
    model.requires_grad_(False)
    size = offload_frozen(model, "disk", torch.device("cpu"), tmp_path / "offload")
    given = recipe("model.dtype=float32", "lora.rank=4", "train.gradient_checkpointing=true", "model.offload=disk")
    shape = shape_of(tiny_config("llama"))
    assert offloaded_bytes(shape, given) == size
    assert offloaded_bytes(shape, recipe()) == 0


@pytest.mark.parametrize(("window", "back"), [(32_768, 1), (4096, 0)])
def test_an_offloaded_base_leaves_one_layer_on_the_gpu(window: int, back: int) -> None:
    """None while the loss is made, which is the peak of a window whose logits are in one piece."""
    shape, given = shape_of(SHAPES[SEVEN].config()), (*OFFLOADED, f"data.window={window}")
    whole = training_memory(shape, recipe(*given))
    away = training_memory(shape, recipe(*given, "model.offload=cpu"))
    layer = 2 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    assert away["fetched layer"] == back * layer
    assert whole["weights"] - away["weights"] == 32 * layer
    assert sum(whole.values()) - sum(away.values()) == pytest.approx((32 - back) * layer)
    assert step_of(shape, recipe(*OFFLOADED, "model.offload=disk"), GPUS["h100"]) is None  # disks differ too much


def test_the_command_says_what_would_fit_and_what_waits_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    SHAPES[SEVEN].config().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"
    assert main(["plan", str(tmp_path), "--gpu", "rtx4090"]) == 0
    told = capsys.readouterr().out
    assert "DOES NOT FIT" in told and "what would fit:" in told
    assert "--set model.quantization=nf4" in told and "--set model.offload=cpu" in told
    sets = [part for setting in (*OFFLOADED, "model.offload=disk") for part in ("--set", setting)]
    assert main(["plan", str(tmp_path), "--gpu", "rtx4090", *sets]) == 0
    told = capsys.readouterr().out
    size = 32 * 2 * (4 * 4096 * 4096 + 3 * 4096 * 11008) / 1e9
    line = f"{size:.2f} GB more in files of the run folder; every batch brings {2 * size:.2f} GB to the GPU"
    assert line in told
    assert ": fits" in told and "what would fit" not in told
