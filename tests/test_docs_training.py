"""scripts/docs_training.py: docs/training-speed.md says what Records say, and what they could not measure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest
from scripts_of import load_script

from e2llm.records import Record, make_row

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture(scope="module")
def training() -> ModuleType:
    return load_script(SCRIPTS / "docs_training.py")


def train_record(tmp_path: Path, rows: list[dict], *, name: str = "train_x", **config: object) -> Record:
    facts = {"shape": "llama-1b", "rounds": 1, "figure1": False, "failed": {}, "out_of_memory": [], "not_run": []}
    facts |= {"settings": [], "windows": [], "full_windows": []}
    path = tmp_path / f"{name}.json"
    return Record("benchmark_train", {**facts, **config}, rows, environment={"gpu": "G"}, path=path)


def train_rows(
    trainer: str, window: int = 4096, *, recompute: bool = False, batch: int = 4, gpus: int = 1, **values: float
) -> list[dict]:
    labels: dict = {"trainer": trainer, "shape": "llama-1b", "window": window, "batch_size": batch}
    labels |= {"checkpointing": recompute, "gpus": gpus, "parallelism": "fsdp2" if gpus > 1 else "none"}
    units = {"tokens_per_second": "tokens/s", "peak_memory_bytes": "bytes", "model_flops_utilization": "share"}
    units |= {"seconds_per_million_tokens": "s"}
    return [
        make_row(metric, value, units.get(metric, "ratio"), 3, **labels, low=value / 2, high=value * 2)
        for metric, value in values.items()
    ]


def test_training_tables_and_targets_follow_the_figures(training: ModuleType, tmp_path: Path) -> None:
    ours = {"model_flops_utilization": 0.51, "memory_ratio_to_hf": 0.7, "ratio_to_plain_positions": 0.996}
    rows = train_rows("e2llm", tokens_per_second=60_000, peak_memory_bytes=40e9, ratio_to_hf=1.5, **ours)
    rows += train_rows("hf", tokens_per_second=40_000, peak_memory_bytes=57e9)
    profiled: dict = {"trainer": "e2llm", "batch_size": 4, "window": 4096, "kernels": "loss"}
    rows.append(make_row("device_seconds_per_step", 0.2, "s", 5, **profiled))
    record = train_record(tmp_path, rows, failed={"hf-liger": "no such package"}, out_of_memory=["hf 8 x 4096"])
    page = training.training_page([record])
    assert "## llama-1b, G (`train_x`)" in page
    assert "| e2llm | 4 × 4k | 60,000 (30,000–120,000) | 51.0% | 40.0 GB | 1.500 | 0.996 | 0.700 |" in page
    assert "| hf | 4 × 4k | 40,000 (20,000–80,000) |  | 57.0 GB |  |  |  |" in page
    assert "| at least half of the card's dense peak | 0.510 | yes |" in page
    assert "| at most 0.6 of hf's peak memory | 0.700 | **no** |" in page
    assert "| random scales and offsets cost at most 0.5 % | 0.996 | yes |" in page
    assert "`hf-liger` failed: no such package" in page and "`hf 8 x 4096` ran out of memory." in page
    assert "| loss | 200.0 | 100.0% |" in page
    seen = "| llama-1b | random scales and offsets cost at most 0.5 % | 0.996 (G, one round) |"
    assert seen in page and "| llama-1b | at most 0.6 of hf's peak memory | **0.700 (G)** |" in page
    assert "No Record yet" in training.training_page([])


def test_a_record_that_measured_nothing_says_why(training: ModuleType, tmp_path: Path) -> None:
    page = training.training_page([train_record(tmp_path, [], out_of_memory=["hf 8 x 4096"])])
    assert "## llama-1b, G (`train_x`)\n\nNothing was measured.\n\n- `hf 8 x 4096` ran out of memory." in page
    assert "No Record yet" not in page


def test_what_another_record_measured_is_not_missing(training: ModuleType, tmp_path: Path) -> None:
    late = ["hf 4 x 4096", "e2llm 4 x 4096", "litgpt 4 x 4096"]
    first = train_record(tmp_path, train_rows("e2llm", tokens_per_second=60_000), name="a", not_run=late, rounds=2)
    second = train_record(tmp_path, train_rows("hf", tokens_per_second=40_000), name="b")
    page = training.training_page([first, second])
    assert "- `hf 4 x 4096` was not run here: time was up. Measured in `b`." in page
    assert "- `e2llm 4 x 4096` was run in fewer than 2 rounds: time was up." in page
    assert "- `litgpt 4 x 4096` was not run: time was up." in page
    other = Record(second.kind, {**second.config, "shape": "other"}, second.rows, environment={"gpu": "G"})
    assert "- `hf 4 x 4096` was not run: time was up." in "\n".join(training.left_out(first, [first, other]))


def test_several_gpus_are_set_against_our_fastest_on_one(training: ModuleType, tmp_path: Path) -> None:
    spread = train_rows("e2llm", gpus=2, tokens_per_second=90_000, ratio_to_one_gpu=2.0)
    own = train_rows("e2llm", tokens_per_second=45_000)
    first = train_record(tmp_path, own + spread, name="spread", settings=["train.optimizer=adamw"])
    rows = train_rows("e2llm", batch=8, tokens_per_second=60_000) + train_rows("hf", tokens_per_second=80_000)
    second = train_record(tmp_path, rows + train_rows("e2llm", 8192, tokens_per_second=70_000), name="fast")
    page = training.training_page([first, second])
    assert "against one GPU with the same settings, not against our fastest" in page
    assert page.count("Settings of `e2llm` beyond the recipe's: `train.optimizer=adamw`.") == 1
    assert "60,000 tokens/s (`fast`, another run), and fsdp2 on 2 GPUs reaches 1.500 × as much." in page
    assert "| two GPUs at least 1.9 × one, fsdp2 | 2.000 | yes |" in page
    assert "| two GPUs at least 1.9 × one at its fastest, fsdp2 | 1.500 | **no** |" in page
    page = training.training_page([first])
    assert "with the same settings: our fastest on one such GPU." in page and "not against our fastest" not in page


@pytest.mark.parametrize(("settings", "reaches"), [(["model.offload=cpu", "train.compile=none"], False), ([], True)])
def test_an_offloaded_base_reaches_for_no_target(
    training: ModuleType, tmp_path: Path, settings: list[str], reaches: bool
) -> None:
    rows = train_rows("e2llm", recompute=True, tokens_per_second=900, model_flops_utilization=0.02)
    page = training.training_page([train_record(tmp_path, rows, shape="llama-2-7b-lora", settings=settings)])
    assert ("| **no** |" in page) == reaches and ("`model.offload=cpu`" in page) != reaches


def test_adapters_of_the_7b_shape_have_two_targets(training: ModuleType, tmp_path: Path) -> None:
    rows = train_rows("e2llm", tokens_per_second=16_600, model_flops_utilization=0.51)
    page = training.training_page([train_record(tmp_path, rows, shape="llama-2-7b-lora")])
    assert "| at least half of the card's dense peak | 0.510 | yes |" in page
    assert "| at least 16.7k tokens/s | 16,600 | **no** |" in page
    kept = "| at least half of the peak, two windows, activations kept | 0.510 | yes |"
    for batch, recompute in ((4, False), (2, True), (2, False)):
        rows = train_rows("e2llm", batch=batch, recompute=recompute, model_flops_utilization=0.51)
        page = training.training_page([train_record(tmp_path, rows, shape="llama-2-7b-lora")])
        assert (kept in page) == (batch == 2 and not recompute)


def test_losses_of_the_fast_arithmetic_are_compared_step_by_step(training: ModuleType, tmp_path: Path) -> None:
    curves = {"float32": [3.0, 2.0, 1.0], "bfloat16": [3.0, 2.1, 0.9], "bfloat16, adamw_split": [3.3, 2.0, 1.0]}
    rows = []
    for arithmetic, curve in curves.items():
        labels: dict = {"arithmetic": arithmetic, "seed": 0}
        rows += [make_row("loss", y, "nats", 1, **labels, split="train", step=s + 1) for s, y in enumerate(curve)]
        held = {"split": "held_out", "step": 3, "scale": 4.0}
        rows.append(make_row("loss", curve[-1] + 1, "nats", 9, **labels, **held))
    config = {"recipe": "recommended", "steps": 3}
    record = Record("train_losses", config, rows, environment={"gpu": "G"}, path=tmp_path / "train_losses.json")
    page = training.training_page([record])
    assert "## Losses of the fast arithmetic: 3 steps of `recommended`, G" in page
    assert "| float32 | 2.0000 | 2.0000 |  |  |" in page
    assert "| bfloat16 | 2.0000 | 1.9000 | 0.0667 | 0.1000 |" in page
    assert "| bfloat16, adamw_split | 2.1000 | 2.0000 | 0.1000 | 0.3000 |" in page
    ((file, drawing),) = training.image_drawings([record]).items()
    assert f"(images/{file})" in page and file == "losses-train-losses.svg"
    assert "bfloat16, adamw_split" in drawing.save(tmp_path / file).read_text(encoding="utf-8")


def test_figure_1_adds_up_windows_of_several_records(training: ModuleType, tmp_path: Path) -> None:
    def record(name: str, *rows: list[dict], late: Sequence[str] = (), **config: object) -> Record:
        together = [row for some in rows for row in some]
        return train_record(tmp_path, together, name=name, figure1=True, not_run=[f"last of {name}", *late], **config)

    def one(trainer: str, window: int, seconds: float, recompute: bool = False) -> list[dict]:
        values = {"seconds_per_million_tokens": seconds, "tokens_per_second": 1e6 / seconds, "peak_memory_bytes": 2e10}
        return train_rows(trainer, window, recompute=recompute, batch=1, **values)

    first = record("a", one("e2llm", 4096, 50), one("full-length", 16_384, 150, recompute=True))
    second = record("b", one("full-length", 32_768, 250, recompute=True))
    page = training.training_page([first, second])
    assert page.count("## Figure 1") == 1
    assert "| ours, random scales | 4k | 20.0 GB | 20,000 | 50.0 | kept |" in page
    assert "| full length, YaRN | 32k | 20.0 GB | 4,000 | 250.0 | recomputed |" in page
    assert "To serve 16k, 32k, at a million" in page and "each, 400.0 s. Ours, one run" in page
    assert "- at windows of 4k: 50.0 s, 0.125 of that" in page
    assert "`last of a` was not run" in page and "`last of b` was not run" in page
    images = training.image_drawings([first, second])
    assert len(images) == 2
    for file, drawing in images.items():
        assert f"(images/{file})" in page
        text = drawing.save(tmp_path / file).read_text(encoding="utf-8")
        assert "full length, recomputed" in text and "128k" not in text
    said = "Full length was made to recompute activations at 16k, 32k from the start: it was not tried with"
    assert f"{said} activations kept. Ours kept them at 4k: part of the difference" in page

    # Records of windows that ran out of memory, were not measured, or were in time elsewhere.
    large = {
        "full_windows": [65_536],
        "out_of_memory": ["full-length 1 x 65536", "full-length 1 x 65536 checkpointing"],
    }
    third = record("c", **large, late=["full-length 1 x 32768 checkpointing"])
    fourth = record("d", one("e2llm", 4096, 80, recompute=True), full_windows=[131_072])
    page = training.training_page([first, second, third, fourth])
    assert page.count("## Figure 1") == 1
    assert "| full length, YaRN | 64k | out of memory |  |  | kept |" in page
    assert "| full length, YaRN | 64k | out of memory |  |  | recomputed |" in page
    assert "To serve 16k, 32k, at a million tokens a run: full length, a run for each, 400.0 s. " in page
    assert "64k is not in it: full length there ran out of memory on this card. 128k is not in it: " in page
    assert (
        "at 64k because memory ran out with activations kept. Ours kept them at 4k, and recomputed them at 4k" in page
    )
    assert (
        "`last of c` was not run" in page and "32768 checkpointing`" not in page and "ran out of memory.\n" not in page
    )
