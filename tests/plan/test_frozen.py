"""What a frozen base costs in time that is packed in 4 bits or waits in host memory, by hand for the 7B shape."""

from __future__ import annotations

from pathlib import Path

import pytest

from e2llm.benchmark.shapes import SHAPES
from e2llm.cli import main
from e2llm.config import load_recipe
from e2llm.plan.shape import shape_of
from e2llm.plan.speed import GPUS
from e2llm.plan.step import Step, step_of

BASE = ("model.dtype=bfloat16", "lora.rank=16", "train.batch_size=2")
AGAIN = "train.gradient_checkpointing=true"
MATRICES = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)


def step(*settings: str, gpu: str = "h100", gpus: int = 1) -> Step:
    recipe = load_recipe("recommended-yarn", [*BASE, *settings])
    found = step_of(shape_of(SHAPES["llama-2-7b-lora"].config()), recipe, GPUS[gpu], gpus)
    assert found is not None
    return found


@pytest.mark.parametrize("gpu, bandwidth", [("h100", 3.35e12), ("rtx4090", 1.008e12)])
def test_a_packed_base_is_unpacked_at_every_use(gpu: str, bandwidth: float) -> None:
    packed = "model.quantization=nf4"
    for settings, uses in (((), 2), ((AGAIN,), 3), ((AGAIN, "train.gradient_accumulation=4"), 12)):
        whole, four = step(*settings, gpu=gpu), step(*settings, packed, gpu=gpu)
        assert whole.frozen == 0
        assert four.frozen == pytest.approx(uses * MATRICES * 15.7 / bandwidth)
        assert four.seconds - whole.seconds == pytest.approx(four.frozen)


def test_a_base_in_host_memory_comes_twice_a_batch() -> None:
    settings = (AGAIN, "train.compile=none")
    whole, away = step(*settings), step(*settings, "model.offload=cpu")
    assert away.frozen == pytest.approx(2 * 2 * MATRICES / 23.8e9)
    assert away.seconds - whole.seconds == pytest.approx(away.frozen)


def test_the_command_says_what_the_speed_rests_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    SHAPES["llama-2-7b"].config().save_pretrained(tmp_path)
    given = ["plan", str(tmp_path), "--gpu", "rtx4090", *(part for one in (*BASE, AGAIN) for part in ("--set", one))]
    packed = ["--set", "model.quantization=nf4", "--set", "train.compile=layers"]
    assert main([*given, *packed]) == 0
    told = capsys.readouterr().out
    assert "% of the time goes into unpacking 4-bit weights, a speed that rests on five runs" in told
    assert main([*given, "--set", "model.offload=cpu", "--set", "train.compile=none"]) == 0
    told = capsys.readouterr().out
    assert "goes into fetching weights from host memory, a speed that rests on two runs" in told
    assert "--set train.compile=layers:" not in told, "a fetched base cannot be compiled"
    assert main([*given, "--set", "model.offload=disk", "--set", "train.compile=none"]) == 0
    assert "speed: not known for" in capsys.readouterr().out
