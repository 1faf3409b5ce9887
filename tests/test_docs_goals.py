"""scripts/docs_goals.py: a goal is met, missed or open by what Records hold, and by nothing else."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from scripts_of import load_script

from e2llm.records import Record, make_row

SCRIPTS = Path(__file__).parents[1] / "scripts"
LABELS: dict[str, Any] = {"base_model": "SmolLM2-135M-Instruct", "native_window": 8192}
FALLING = {8192: 4.0, 32_768: 3.8, 65_536: 3.6, 131_072: 3.4, 262_144: 3.9}


@pytest.fixture(scope="module")
def goals() -> ModuleType:
    return load_script(SCRIPTS / "docs_goals.py")


def losses(values: dict[int, float], corpus: str, checkpoint: str = "recommended", n: int = 10) -> list[dict[str, Any]]:
    return [
        make_row("perplexity", value, "ratio", n, corpus=corpus, protocol="whole", window=window,
                 scale=max(1.0, window / 8192), checkpoint=checkpoint, **LABELS)
        for window, value in values.items()
    ]  # fmt: skip


def key(value: float, n: int, window: int = 32_768, task: str = "pass_key", **more: Any) -> dict[str, Any]:
    more = {"checkpoint": "recommended", "scale": window / 8192, **more}
    return make_row("retrieval", value, "share", n, task=task, window=window, corpus="novels", **more, **LABELS)


def record(*rows: Any, kind: str = "evaluate", **config: Any) -> Record:
    return Record(kind, config, [r for row in rows for r in (row if isinstance(row, list) else [row])], environment={})


def table(goals: ModuleType, *records: Record) -> dict[str, list[str]]:
    """Figure -> its cells from the checkpoints."""
    lines = [line.strip("| ").split(" | ") for line in goals.goals_block(records)[-1].split("\n")]
    return {line[0]: line[2:] for line in lines}


def test_without_records_there_is_no_verdict(goals: ModuleType) -> None:
    assert set(map(len, table(goals).values())) == {0} and len(table(goals)) == len(goals.GOALS) + 2
    some = table(goals, record(losses({8192: 4.0}, "mathematics")))
    assert {cells[0] for figure, cells in some.items() if figure not in ("figure", "---")} == {"not measured"}


def test_perplexity_is_relative_to_the_same_tokens(goals: ModuleType) -> None:
    good = table(goals, record(losses(FALLING, "mathematics"), losses(FALLING, "novels")))
    assert good["perplexity, mathematics, 32k / 64k / 128k"] == ["0.950 / 0.900 / 0.850: met"]
    assert good["perplexity, novels, 128k"] == ["0.85: met"]
    assert good["perplexity, 256k"] == ["mathematics 0.97, novels 0.97: met"]
    bad = FALLING | {131_072: 4.1, 262_144: 4.2}
    found = table(goals, record(losses(bad, "mathematics"), losses(bad, "novels")))
    assert found["perplexity, mathematics, 32k / 64k / 128k"] == ["0.950 / 0.900 / 1.025: **not met**"]
    assert found["perplexity, novels, 128k"] == ["1.02: **not met**"]
    # one corpus alone can miss the goal, but not reach it
    assert table(goals, record(losses(FALLING, "novels")))["perplexity, 256k"] == ["novels 0.97: not measured whole"]
    assert table(goals, record(losses(bad, "novels")))["perplexity, 256k"] == ["novels 1.05: **not met**"]
    # two Records, or other tokens: no ratio
    apart = table(goals, record(losses({8192: 4.0}, "novels")), record(losses({131_072: 3.0}, "novels")))
    assert apart["perplexity, novels, 128k"] == ["not measured"]
    other = record(losses({8192: 4.0}, "novels"), losses({131_072: 3.0}, "novels", n=11))
    assert table(goals, other)["perplexity, novels, 128k"] == ["not measured"]
    # the Record with most tokens counts
    more = record(losses(bad, "novels", n=99))
    assert table(goals, record(losses(FALLING, "novels")), more)["perplexity, novels, 128k"] == ["1.02: **not met**"]


def test_a_share_needs_its_prompts(goals: ModuleType) -> None:
    for value, n, cell in (
        (0.96, 100, "0.96 of 100: met"),
        (0.96, 50, "0.96 of 50: too few prompts"),
        (0.94, 100, "0.94 of 100: **not met**"),
        (0.2, 20, "0.20 of 20: **not met**"),
    ):
        assert table(goals, record(key(value, n)))["pass key, 32k"] == [cell]
    # of a grid of scales the one that serving would take without a calibration
    grid = record(key(1.0, 100, scale=3.0), key(0.5, 100, scale=4.0))
    assert table(goals, grid)["pass key, 32k"] == ["0.50 of 100: **not met**"]
    assert table(goals, record(key(0.9, 100, 65_536, "uuid_kv")))["`uuid_kv`, 64k"] == ["0.90 of 100: met"]


def test_short_text_is_held_against_plain_fine_tuning(goals: ModuleType) -> None:
    def both(ours: float) -> tuple[Record, Record]:
        mine = [losses({8192: ours}, corpus) for corpus in goals.CORPORA]
        theirs = [losses({8192: 4.0}, corpus, "plain") for corpus in goals.CORPORA]
        return record(*mine), record(*theirs)

    name = "perplexity at 8k against plain fine-tuning"
    assert table(goals, *both(4.02))[name] == ["mathematics +0.5 %, novels +0.5 %: met"]
    assert table(goals, *both(4.03))[name] == ["mathematics +0.8 %, novels +0.8 %: **not met**"]

    def short(value: float, checkpoint: str, n: int = 50) -> Record:
        about = {"suite": "short", "task": "t", "harness_metric": "acc", "checkpoint": checkpoint, "scale": 1.0}
        return record(make_row("accuracy", value, "share", n, **about, **LABELS))

    name = "short tasks against plain fine-tuning"
    assert table(goals, short(0.496, "recommended"), short(0.5, "plain"))[name] == ["-0.4 points, 1 tasks: met"]
    assert "**not met**" in table(goals, short(0.49, "recommended"), short(0.5, "plain"))[name][0]
    assert table(goals, short(0.5, "recommended"), short(0.5, "plain", 40))[name] == ["not measured"]


def test_a_final_comparison_replaces_single_runs_and_says_its_seeds(goals: ModuleType) -> None:
    finals = [
        record(losses(FALLING | {131_072: last}, "novels"), kind="study_final", recipe={"name": "recommended"})
        for last in (3.4, 3.8)
    ]
    single = record(losses(FALLING | {131_072: 8.0}, "novels", n=99))
    found = table(goals, single, *finals)
    assert found["perplexity, novels, 128k"] == ["0.90 (2 seeds): met"]
    # what the final comparison has not measured still comes from the single run
    assert table(goals, record(key(1.0, 100)), *finals)["pass key, 32k"] == ["1.00 of 100: met"]
    # also a window beside the native one, which both have
    to_128k = {window: value for window, value in FALLING.items() if window < 262_144}
    final = record(losses(to_128k, "novels"), kind="study_final", recipe={"name": "recommended"})
    far = record(losses({8192: 5.0, 262_144: 5.5}, "novels", n=99))
    found = table(goals, far, final)
    assert found["perplexity, 256k"] == ["novels 1.10: **not met**"]
    assert found["perplexity, novels, 128k"] == ["0.85: met"]


def test_a_run_of_the_study_counts_when_it_is_long(goals: ModuleType) -> None:
    rows = [{**row, "slope": 0.04} for row in losses(FALLING, "novels", "long")]
    rows += [{**row, "value": 9.0, "slope": 0.07} for row in losses(FALLING, "novels", "long")]
    runs = [
        record(rows, kind="study", recipe={"name": name, "train": {"steps": steps}})
        for name, steps in (("long", 1200), ("quick", 300))
    ]
    found = table(goals, *runs)
    assert found["figure"] == ["`study: long`"] and found["perplexity, novels, 128k"] == ["0.85: met"]
