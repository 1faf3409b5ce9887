"""benchmarks/links.py: bytes of each collective as the plan counts them, and a Record of two processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from scripts_of import load_script

from e2llm.plan.exchange import INSIDE
from e2llm.records import Record, make_row

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "links.py"
KINDS = ("all-gather", "reduce-scatter", "all-reduce")


@pytest.fixture(scope="module")
def links() -> ModuleType:
    return load_script(SCRIPT)


def test_two_processes_write_a_record(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    given = ["--mib", "1", "2", "--rounds", "3", "--out", str(tmp_path)]
    alone = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *given], env=alone, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = Record.load(tmp_path / "links_2.json").rows
    assert {(row["collective"], row["buffer_bytes"]) for row in rows} == {(k, 2**20 * n) for k in KINDS for n in (1, 2)}
    assert all(row["n"] == 3 and 0 < row["low"] <= row["value"] <= row["high"] and row["gpus"] == 2 for row in rows)
    assert "the plan takes 268 (plan.exchange)" in done.stdout


@pytest.mark.parametrize(("world", "shares"), [(2, (0.5, 0.5, 1.0)), (8, (0.875, 0.875, 1.75))])
def test_bytes_are_those_that_move_through_one_link(
    links: ModuleType, monkeypatch: pytest.MonkeyPatch, world: int, shares: tuple[float, ...]
) -> None:
    """In a ring each GPU passes on all parts but its own; for a sum that all get, twice."""
    monkeypatch.setattr(links.dist, "get_world_size", lambda: world)
    monkeypatch.setattr(links.dist, "all_reduce", lambda *given: None)
    monkeypatch.setattr(links, "seconds_of", lambda call, rounds, device: [0.5] * rounds)
    size = 64 * 2**20
    rows: list[dict[str, Any]] = links.measure([size], 3, torch.device("cpu"))
    assert {row["collective"]: row["value"] for row in rows} == {
        name: pytest.approx(2 * share * size) for name, share in zip(KINDS, shares, strict=True)
    }


def test_the_page_of_clusters_names_the_slowest(links: ModuleType) -> None:
    clusters = load_script(SCRIPT.parents[1] / "scripts" / "docs_clusters.py")
    speeds = ((2**20, 1e9), (2**30, 300e9), (2**30, 250e9))
    rows = [
        make_row(
            "bytes_per_second", speed, "bytes/s", 3, collective=kind, buffer_bytes=size, gpus=8, low=speed, high=speed
        )
        for kind, (size, speed) in zip(KINDS, speeds, strict=True)
    ]
    text = clusters._links([Record("links", {}, rows, environment={"gpu": "G"})])
    assert "250 GB/s (250–250) between 8 × G (all-reduce of 1.1 GB)" in text


@pytest.mark.parametrize(("world", "local"), [(1, 1), (16, 8)])
def test_one_process_or_several_machines_are_refused(
    links: ModuleType, world: int, local: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": local}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(SystemExit):
        links.main([])
    assert f"{world} processes for" in capsys.readouterr().err


def test_the_plan_takes_what_was_measured() -> None:
    """The slowest collective at the largest size of the committed Record."""
    rows = Record.load(SCRIPT.parent / "results" / "links_2.json").rows
    largest = max(row["buffer_bytes"] for row in rows)
    assert min(row["value"] for row in rows if row["buffer_bytes"] == largest) == pytest.approx(INSIDE, rel=0.005)
