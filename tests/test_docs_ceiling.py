"""scripts/docs_ceiling.py: the least time of a step, against counts written out by hand."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from scripts_of import load_script
from test_docs_training import train_record, train_rows

from e2llm.benchmark.shapes import SHAPES
from e2llm.records import Record, make_row

SCRIPTS = Path(__file__).parents[1] / "scripts"
KINDS = {"matrix products": 0.2, "attention backward": 0.1, "loss": 0.05, "idle": 0.01}


@pytest.fixture(scope="module")
def ceiling() -> ModuleType:
    return load_script(SCRIPTS / "docs_ceiling.py")


def record_of(tmp_path: Path, *, shape: str = "smollm2-135m", gpu: str = "NVIDIA H200", hf: bool = True) -> Record:
    labels = {"trainer": "e2llm", "batch_size": 2, "window": 4096}
    rows = [make_row("device_seconds_per_step", value, "s", 5, kernels=kind, **labels) for kind, value in KINDS.items()]
    for batch, speed in {4: 10_000, 8: 11_000}.items() if hf else ():
        rows += train_rows("hf", batch=batch, tokens_per_second=speed)
    record = train_record(tmp_path, rows, shape=shape)
    record.environment["gpu"] = gpu
    return record


def test_what_one_token_of_one_layer_moves(ceiling: ModuleType) -> None:
    # SmolLM2: 576 wide, 1536 inside, 9 heads of 64, 3 of them keys'. In numbers, forward then backward:
    norm, norm_back = 576 + 576 + 576 + 576, 576 + 576 + 576 + 576
    rotation = 2 * (576 + 192)
    gate, gate_back = 1536 * 2 + 1536, 1536 * 3 + 1536 * 2
    wanted = 2 * norm + rotation + gate + 2 * norm_back + rotation + gate_back
    assert ceiling.moved_per_token(SHAPES["smollm2-135m"]) == wanted


def test_the_floor_and_the_ratio_follow_the_profile(ceiling: ModuleType, tmp_path: Path) -> None:
    text, table = ceiling.ceiling_blocks(record_of(tmp_path))
    layers = 30 * 24_576 * 8192 * 2 / 4.8e12
    loss = 49_152 * 8192 * 2 * 2 / 4.8e12
    least = 0.3 + layers + loss
    assert f"{8192 / least:,.0f} tokens/s, {8192 / least / 11_000:.2f} × `hf`" in text
    assert f"measured: {8192 / 0.36:,.0f}, {least / 0.36:.0%} of it" in text
    assert f"| together | {least * 1000:.1f} | 360.0 |" in table and f"| loss | {loss * 1000:.1f} | 50.0 |" in table
    assert f"with copies and idle time | {layers * 1000:.1f} | 10.0 |" in table


@pytest.mark.parametrize("odd", [{"shape": "llama-2-7b-lora"}, {"gpu": "Radeon"}, {"hf": False}])
def test_nothing_is_said_without_what_it_needs(ceiling: ModuleType, tmp_path: Path, odd: dict) -> None:
    assert ceiling.ceiling_blocks(record_of(tmp_path, **odd)) == []
