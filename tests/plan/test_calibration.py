"""The plan against every committed Record of our trainer, with all constants and with those found without its shape."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from scripts_of import load_script

from e2llm.plan.calibration import Run, fit, fit_fetched, fit_plain, fit_recomputed, fit_unpacked
from e2llm.plan.frozen import FETCHED_PER_SECOND, UNPACKED
from e2llm.plan.memory import RECOMPUTED, RECOMPUTED_ADAPTERS
from e2llm.plan.speed import GPUS, PLAIN, SHARES, Shares
from e2llm.plan.step import step_of

records = load_script(Path(__file__).resolve().parents[2] / "scripts" / "plan_records.py")
RUNS: tuple[Run, ...] = records.measured_runs()
SPEED, MEMORY = 0.20, 0.10
"""What the plan may be off."""


def recomputed(runs: list[Run], *, adapters: bool) -> list[Run]:
    return [run for run in runs if run.recipe.train.gradient_checkpointing and bool(run.recipe.lora.rank) == adapters]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_the_plan_is_what_was_measured(run: Run) -> None:
    """On the card that it ran on, on one GPU and on several."""
    assert run.memory_ratio() == pytest.approx(1, abs=MEMORY)
    assert run.speed_ratio() == pytest.approx(1, abs=SPEED)


@pytest.mark.parametrize("run", records.plain_runs(), ids=lambda run: run.name)
def test_layers_that_are_not_compiled(run: Run) -> None:
    """Offloaded bases among them; nothing of their memory was fitted."""
    assert run.recipe.train.compile == "none"
    assert run.memory_ratio() == pytest.approx(1, abs=MEMORY)
    assert run.speed_ratio() == pytest.approx(1, abs=SPEED)


def test_the_records_hold_what_the_plan_is_said_to_be_tested_on() -> None:
    assert {run.family for run in RUNS} == set(records.FAMILIES)
    assert {run.gpu.name for run in RUNS} == {GPUS["h100"].name, GPUS["h200"].name}
    assert {run.recipe.distributed.strategy for run in RUNS if run.gpus == 2} == {"ddp", "fsdp2"}
    assert any(run.recipe.placement.far_weight for run in RUNS), "the default recipe's far keys"
    assert {run.recipe.model.offload for run in records.plain_runs()} == {"none", "cpu"}
    assert {run.family for run in RUNS if run.kernels} == set(records.FAMILIES)


@pytest.mark.parametrize("family", records.FAMILIES)
def test_each_shape_is_predicted_from_the_others(family: str) -> None:
    """All its windows, cards and numbers of GPUs. Memory's factor for adapters has no second shape: see below."""
    others, held = ([run for run in RUNS if (run.family == family) == own] for own in (False, True))
    shares, again = fit(others), fit_recomputed(recomputed(others, adapters=False))
    speeds = {run.name: run.speed_ratio(shares) for run in held}
    assert {name: speed for name, speed in speeds.items() if speed and abs(speed - 1) > SPEED} == {}
    peaks = {
        run.name: run.memory_ratio(again)
        for run in held
        if not (run.recipe.lora.rank and run.recipe.train.gradient_checkpointing)
    }
    assert {name: peak for name, peak in peaks.items() if abs(peak - 1) > MEMORY} == {}


@pytest.mark.parametrize("window", sorted({run.recipe.data.window for run in RUNS}))
def test_each_window_is_predicted_from_the_others(window: int) -> None:
    shares = fit([run for run in RUNS if run.recipe.data.window != window])
    held = [run for run in RUNS if run.recipe.data.window == window]
    speeds = {run.name: run.speed_ratio(shares) for run in held}
    assert {name: speed for name, speed in speeds.items() if speed and abs(speed - 1) > SPEED} == {}


def test_memory_of_windows_with_adapters_is_predicted_from_the_others() -> None:
    runs = recomputed(list(RUNS), adapters=True)
    windows = {run.recipe.data.window for run in runs}
    assert len(windows) == 6
    for window in windows:
        again = fit_recomputed([run for run in runs if run.recipe.data.window != window])
        for run in runs:
            if run.recipe.data.window == window:
                assert run.memory_ratio(again) == pytest.approx(1, abs=MEMORY), run.name


def test_the_page_of_clusters_says_how_far_held_out_peaks_are() -> None:
    found = records.held_out_peaks()
    assert len(found) == len(RUNS) and found != [run.memory_ratio() for run in RUNS]
    assert all(ratio == pytest.approx(1, abs=MEMORY) for ratio in found)


def test_the_constants_are_those_that_the_records_give() -> None:
    found = fit(RUNS)
    assert found.products == pytest.approx(SHARES.products, rel=0.03)
    assert found.attention == pytest.approx(SHARES.attention, rel=0.03)
    assert found.moves == pytest.approx(SHARES.moves, rel=0.03)
    runs = list(RUNS)
    assert fit_recomputed(recomputed(runs, adapters=False)) == pytest.approx(RECOMPUTED, abs=0.06)
    assert fit_recomputed(recomputed(runs, adapters=True)) == pytest.approx(RECOMPUTED_ADAPTERS, abs=0.06)
    assert fit_unpacked(runs) == pytest.approx(UNPACKED, rel=0.03)
    assert fit_plain(records.plain_runs()) == pytest.approx(PLAIN, rel=0.03)
    assert fit_fetched(records.plain_runs()) == pytest.approx(FETCHED_PER_SECOND, rel=0.03)


def test_a_fit_finds_what_made_the_runs() -> None:
    made = Shares(products=0.5, attention=0.25, moves=6.0)
    runs = []
    for run in RUNS:
        step = step_of(run.shape, run.recipe, run.gpu, run.gpus, made)
        if step is not None:
            runs.append(replace(run, tokens_per_second=step.tokens_per_second, kernels={}))
    found = fit(runs)
    assert (found.products, found.attention, found.moves) == pytest.approx((0.5, 0.25, 6.0), rel=1e-6)
    with pytest.raises(ValueError, match="do not tell"):
        fit([runs[0]])
    full = recomputed(list(RUNS), adapters=False)
    changed = [replace(run, peak_bytes=run.peak_bytes * run.memory_ratio(1.4)) for run in full]
    assert fit_recomputed(changed) == pytest.approx(1.4)
    assert fit_recomputed([]) == 1.0
