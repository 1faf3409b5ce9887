"""The serving benchmark on the embedded base: real engines, every figure from what they made."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

import e2llm
from e2llm.benchmark import contestants
from e2llm.benchmark.serve import ServeConfig, benchmark_serve
from e2llm.cli import main
from e2llm.hf import load_model
from e2llm.records import Record

BASE = str(Path(e2llm.__file__).parent / "assets" / "tiny-512")


def test_contestants_take_turns_on_the_same_requests() -> None:
    config = ServeConfig(
        model=BASE, requests=3, prompt_tokens=20, new_tokens=4, long_tokens=700, rounds=2, device="cpu", dtype="float32"
    )
    lines: list[str] = []
    record = benchmark_serve(config, progress=lines.append)
    rounds_said = [line for line in lines if not line.startswith("  ")]
    assert rounds_said == ["round 0 of 2 (warm-up)", "round 1 of 2", "round 2 of 2"]
    found = {(row["engine"], row["mix"], row["metric"]): row for row in record.rows}
    assert set(found) == {
        *(
            ("e2llm", mix, f"{what}_per_second")
            for mix in ("single", "mixed")
            for what in ("output_tokens", "prefill_tokens")
        ),
        *(("e2llm", mix, "time_to_first_token_seconds") for mix in ("single", "mixed", "behind")),
        ("e2llm", "behind", "prefill_tokens_per_second"),
        ("transformers", "single", "output_tokens_per_second"),
        ("e2llm", "mixed", "ratio_to_single"),
        ("e2llm", "mixed", "cpu_ratio_to_single"),
        ("e2llm", "single", "ratio_to_transformers"),
        ("e2llm", "single", "cpu_ratio_to_transformers"),
        *(("e2llm", mix, "cpu_seconds") for mix in ("single", "mixed", "behind")),
        ("transformers", "single", "cpu_seconds"),
    }
    rounds: dict[tuple[str, str, str], list[float]] = {}
    for example in record.examples:
        rounds.setdefault((example["engine"], example["mix"], example["metric"]), []).append(example["value"])
    for key, row in found.items():
        assert row["n"] == 2 and row["value"] == statistics.median(rounds[key]) > 0
    speed = "output_tokens_per_second"
    ratios = [a / b for a, b in zip(rounds["e2llm", "mixed", speed], rounds["e2llm", "single", speed], strict=True)]
    assert rounds["e2llm", "mixed", "ratio_to_single"] == ratios
    used = [rounds["e2llm", mix, "cpu_seconds"] for mix in ("single", "mixed")]
    assert rounds["e2llm", "mixed", "cpu_ratio_to_single"] == [a / b for a, b in zip(*used, strict=True)]
    assert {row["window"] for row in record.rows if row["mix"] == "behind"} == {700}
    assert record.config["device"] == "cpu" and "/" not in record.config["model"][:1]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "serve.json"
    sizes = ["--requests", "2", "--prompt-tokens", "8", "--new-tokens", "3", "--rounds", "1", "--scales", "1", "2"]
    assert main(["benchmark", "serve", BASE, *sizes, "--no-transformers", "--device", "cpu", "--out", str(out)]) == 0
    assert "ratio_to_single" in capsys.readouterr().out
    assert Record.load(out).config["scales"] == [1.0, 2.0]
    assert main(["benchmark", "serve", BASE, "--rounds", "0", "--out", str(out)]) == 2
    assert "rounds = 0: use at least 1" in capsys.readouterr().err


def test_against_the_machine() -> None:
    """Floors and bandwidth come from the same run, and are no faster than they can be."""
    sizes = {"requests": 2, "prompt_tokens": 8, "new_tokens": 2, "rounds": 1, "transformers": False}
    config = ServeConfig(model=BASE, prefill=(100,), decode=((2, 20),), device="cpu", dtype="float32", **sizes)
    saved: list[Record] = []
    record = benchmark_serve(config, save=saved.append)
    assert len(saved) == 2 and saved[-1].rows == record.rows
    found = {(row["mix"], row["metric"]): row["value"] for row in record.rows}
    ratio = found["prefill", "prefill_tokens_per_second"] / found["prefill", "floor_prefill_tokens_per_second"]
    assert found["prefill", "ratio_to_floor"] == pytest.approx(ratio)
    read, copied = found["decode", "read_bytes_per_second"], found["decode", "copy_bytes_per_second"]
    assert found["decode", "ratio_to_bandwidth"] == pytest.approx(read / copied)
    weights = sum(tensor.nbytes for tensor in load_model(BASE, device="cpu", dtype="float32")[0].parameters())
    steps = found["decode", "output_tokens_per_second"] / 2
    assert weights * steps < read < 1.2 * weights * steps, "tied weights are read once, keys on top of them"


def test_one_that_fails_loses_nothing_of_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(contestants, "attention_seconds", lambda *given: 1 / 0)
    out = tmp_path / "serve.json"
    sizes = ["--requests", "2", "--prompt-tokens", "8", "--new-tokens", "3", "--rounds", "1", "--prefill", "50"]
    assert main(["benchmark", "serve", BASE, *sizes, "--no-transformers", "--device", "cpu", "--out", str(out)]) == 1
    assert "e2llm prefill 50 1 failed: ZeroDivisionError" in capsys.readouterr().err
    record = Record.load(out)
    assert record.config["failed"] == {"e2llm prefill 50 1": "ZeroDivisionError: division by zero"}
    assert {row["mix"] for row in record.rows} == {"single", "mixed"}


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (["--prefill", "1m"], "tokens = '1m'"),
        (["--decode", "32"], "decode = '32'"),
        (["--decode", "0x5"], "use at least 1"),
        (["--long-tokens", "x1"], "tokens = 'x1'"),
    ],
)
def test_sizes_that_make_no_sense(wrong: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", "serve", BASE, *wrong]) == 2
    assert named in capsys.readouterr().err
