"""Rows from what contestants measured, every figure worked by hand."""

from __future__ import annotations

from typing import Any

import pytest

from e2llm.benchmark.train_contestants import Contestant
from e2llm.benchmark.train_rows import Measurement, rows_of


def measured(trainer: str, *seconds: float, batch: int = 1, number: int = 0, **more: Any) -> Measurement:
    settings: dict[str, Any] = {
        "shape": "tiny",
        "window": 100,
        "steps": len(seconds),
        "warmup": 1,
        "block": 2,
        "profile": 0,
        "gpus": 1,
        "parallelism": "none",
    }
    result = {"seconds": list(seconds), "peak_memory_bytes": 1000, "device": "cpu", "trained": 10, "frozen": 5}
    one = Contestant(
        trainer=trainer, batch_size=batch, **{**settings, **{k: more.pop(k) for k in {*more} & {*settings}}}
    )
    return Measurement(one, number, {**result, "kernels": [], "gaps": [], **more})


def values(rows: list[dict[str, Any]], metric: str) -> dict[Any, float]:
    return {(r["trainer"], r.get("batch_size")): r["value"] for r in rows if r["metric"] == metric}


def test_medians_of_blocks_with_their_spread() -> None:
    # blocks of two: 1, 2, 4; the seventh step belongs to no whole block
    rows, examples = rows_of([measured("hf", 0.5, 1.5, 2, 2, 3, 5, 100, batch=3)])
    found = {row["metric"]: row for row in rows}
    assert [e["seconds_per_step"] for e in examples] == [1.0, 2.0, 4.0]
    assert (found["seconds_per_step"]["value"], found["seconds_per_step"]["n"]) == (2.0, 3)
    assert (found["seconds_per_step"]["low"], found["seconds_per_step"]["high"]) == (1.0, 4.0)
    speed = found["tokens_per_second"]
    assert (speed["low"], speed["value"], speed["high"]) == (75.0, 150.0, 300.0)
    assert found["seconds_per_million_tokens"]["value"] == pytest.approx(1e6 / 150)
    labels = {"trainer": "hf", "shape": "tiny", "window": 100, "batch_size": 3, "gpus": 1, "parallelism": "none"}
    assert labels.items() <= speed.items()
    assert "model_flops_utilization" not in found, "no peak is known of a CPU"


def test_utilization_on_a_gpu() -> None:
    rows, _ = rows_of([measured("hf", 1, 1, device="cuda", trained=10, frozen=5)])
    # 6 x 10 + 4 x 5 + 6 x layers 2 x width 64 x window 100 FLOPs a token, 100 tokens a second
    assert values(rows, "model_flops_utilization")["hf", 1] == pytest.approx((80 + 76_800) * 100 / 989e12)


def test_ratios_take_each_trainers_fastest_batch_size_and_pair_rounds() -> None:
    rows, _ = rows_of(
        [
            measured("hf", 2, 2),  # 50 tokens/s
            measured("hf", 2.5, 2.5, batch=2),  # 80
            measured("e2llm", 1, 1),  # 100
            measured("e2llm", 4, 4, batch=2),  # 50
            measured("e2llm-plain-positions", 0.8, 0.8),  # 125
            measured("hf", 4, 4, batch=2, number=1),  # 50
            measured("e2llm", 0.5, 0.5, number=1),  # 200
            measured("unsloth", 1.6, 1.6, number=1),  # 62.5
            measured("litgpt", 1.25, 1.25),  # 80
        ]
    )
    assert values(rows, "ratio_to_hf")["e2llm", 1] == pytest.approx((100 / 80 + 200 / 50) / 2)
    assert {r["peer_batch_size"] for r in rows if r["metric"] == "ratio_to_hf" and r["trainer"] == "e2llm"} == {2}
    assert values(rows, "ratio_to_plain_positions") == {("e2llm", 1): pytest.approx(0.8)}
    assert values(rows, "ratio_to_unsloth") == {("e2llm", 1): pytest.approx(3.2), ("hf", 2): pytest.approx(0.8)}
    assert values(rows, "ratio_to_litgpt")["e2llm", 1] == pytest.approx(100 / 80), "in the round that both have"
    larger = [measured("e2llm", 1, 1, batch=4), measured("e2llm", 1, 1, batch=2), measured("e2llm", 1, 1)]
    rows, _ = rows_of([*larger, measured("e2llm-plain-positions", 0.9, 0.9, batch=2)])
    assert values(rows, "ratio_to_plain_positions") == {("e2llm", 2): pytest.approx(0.9)}, "at the same batch size"
    rows, _ = rows_of([measured("e2llm", 1, 1), measured("e2llm-plain-positions", 0.9, 0.9, batch=2)])
    assert not values(rows, "ratio_to_plain_positions")
    assert not any(row["metric"] == "ratio_to_hf_liger_compile" for row in rows)
    assert ("hf", 2) not in values(rows, "ratio_to_hf"), "nobody is measured against itself"


def test_liger_and_compile_count_at_the_fastest_choice_of_kernels_that_runs() -> None:
    rows, _ = rows_of(
        [
            measured("e2llm", 1, 1),  # 100 tokens/s
            measured("hf-liger-compile-own-rope", 2, 2),  # 50
            measured("hf-liger-compile-own-loss", 1.25, 1.25, batch=2),  # 160
            measured("hf-liger-compile-own-loss", 4, 4),  # 25
        ]
    )
    (row,) = [row for row in rows if row["metric"] == "ratio_to_hf_liger_compile"]
    assert (row["trainer"], row["value"]) == ("e2llm", pytest.approx(100 / 160))
    assert (row["peer"], row["peer_batch_size"]) == ("hf-liger-compile-own-loss", 2)


def test_memory_is_compared_at_the_same_batch_size_and_the_highest_peak_counts() -> None:
    rows, _ = rows_of(
        [
            measured("hf", 1, 1, peak_memory_bytes=1000),
            measured("e2llm", 1, 1, peak_memory_bytes=300),
            measured("e2llm", 1, 1, number=1, peak_memory_bytes=400),
            measured("e2llm", 1, 1, batch=2, peak_memory_bytes=900),
        ]
    )
    assert values(rows, "peak_memory_bytes") == {("hf", 1): 1000, ("e2llm", 1): 400, ("e2llm", 2): 900}
    assert values(rows, "memory_ratio_to_hf") == {("e2llm", 1): 0.4}


def test_figure_1_one_run_against_one_for_each_window() -> None:
    rows, _ = rows_of(
        [
            measured("e2llm", 1, 1, window=4096),
            measured("full-length", 8, 8, window=16_384),
            measured("full-length", 24, 24, window=32_768),
        ],
        figure1=True,
    )
    cost = {r["trainer"]: r for r in rows if r["metric"] == "serving_seconds_per_million_tokens"}
    four = 1e6 * (8 / 16_384 + 24 / 32_768)
    assert cost["full-length"]["value"] == pytest.approx(four) and cost["full-length"]["n"] == 2
    assert cost["full-length"]["serves"] == "16k 32k" and cost["full-length"]["window"] is None
    assert cost["e2llm"]["window"] == 4096
    (ratio,) = [r["value"] for r in rows if r["metric"] == "cost_ratio_to_full_length"]
    assert ratio == pytest.approx(1e6 / 4096 / four)


def test_a_profile_becomes_rows_by_class_and_the_longest_kernels() -> None:
    kernels = [
        {"name": "nvjet_a", "kind": "", "seconds": 0.5, "calls": 2.0},
        {"name": "Memset (Device)", "kind": "", "seconds": 0.25, "calls": 1.0},
    ]
    slower = measured("e2llm", 2, 2, batch=1, profile=5, kernels=kernels[:1])
    gap = {"seconds": 0.1, "after": "nvjet_a", "before": "Memset (Device)"}
    rows, examples = rows_of([slower, measured("e2llm", 1, 1, batch=4, profile=5, kernels=kernels, gaps=[gap])])
    assert {row["batch_size"] for row in rows if row["metric"] == "device_seconds_per_step"} == {4}
    found = {row["kernels"]: row["value"] for row in rows if row["metric"] == "device_seconds_per_step"}
    assert found == {"matrix products": 0.5, "copies": 0.25, "idle": 0.25}
    assert [e["kernel"] for e in examples if "kernel" in e] == ["nvjet_a", "Memset (Device)"]
    assert [(e["gap_seconds"], e["after"]) for e in examples if "gap_seconds" in e] == [(0.1, "nvjet_a")]


def test_two_gpus_count_together_and_are_set_against_one() -> None:
    spread = {"gpus": 2, "parallelism": "fsdp2"}
    rows, _ = rows_of(
        [
            measured("e2llm", 1, 1, device="cuda"),  # 100 tokens/s
            measured("e2llm", 1, 1, batch=2),  # 200
            measured("e2llm", 1, 1, batch=2, device="cuda", **spread),  # 400
            measured("e2llm", 0.5, 0.5, **spread),  # 400
            measured("e2llm", 1, 1, gpus=2, parallelism="ddp"),  # 200
            measured("hf", 1, 1),
        ]
    )
    found = {(r["gpus"], r["parallelism"]): r["value"] for r in rows if r["metric"] == "ratio_to_one_gpu"}
    assert found == {(2, "fsdp2"): 2.0, (2, "ddp"): 1.0}
    shares = {r["gpus"]: r["value"] for r in rows if r["metric"] == "model_flops_utilization"}
    assert shares[2] == pytest.approx(2 * shares[1]), "each of the two reads twice the windows of the one"
    others = [r for r in rows if r["metric"] == "ratio_to_hf"]
    assert [r["gpus"] for r in others] == [1], "a peer on one GPU says nothing of two"
