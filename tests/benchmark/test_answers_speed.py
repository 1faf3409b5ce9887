"""The benchmark of answers to long prompts: a whole run, what a round answers, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import e2llm.benchmark.answers as answers_module
from e2llm.benchmark.answers import AnswerSpeedConfig, benchmark_answers
from e2llm.cli import main
from e2llm.records import Record

SIZES = ["--windows", "128", "256", "--prompts", "3", "--new-tokens", "4", "--batch-size", "1", "2", "--rounds", "2"]


def test_a_run_measures_every_way_and_profiles(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, profile = tmp_path / "speed.json", tmp_path / "profile.txt"
    more = ["--chunk-tokens", "32", "256", "--device", "cpu", "--out", str(out), "--profile", str(profile)]
    assert main(["benchmark", "answers", "--shape", "tiny", *SIZES, *more]) == 0
    record = Record.load(out)
    assert record.kind == "answer_speed" and record.config["shape"] == "tiny"
    found = {(r["window"], r["batch_size"], r["chunk_tokens"], r["metric"]): r for r in record.rows}
    ways = {key[:3] for key in found}
    assert ways == {(w, b, c) for w in (128, 256) for b, c in ((1, 0), (2, 32), (2, 256))}
    for way in ways:
        seconds, speed = (found[*way, name]["value"] for name in ("seconds_per_prompt", "tokens_per_second"))
        assert speed == pytest.approx((way[0] - 5) / seconds, rel=0.5)  # medians of two rounds each
        assert found[*way, "ratio_to_reading"]["n"] == 2 and 0 < found[*way, "ratio_to_reading"]["value"]
        assert (found[*way, "start_seconds"]["value"] > 0) == (way[1] > 1), "one at a time makes no serving engine"
    assert "idle" in profile.read_text() and "tokens_per_second" in capsys.readouterr().out


def test_a_round_answers_prompts_of_different_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[list[int], int, int | None]] = []
    real = answers_module.replies

    def spy(engine: Any, asked: Any, *, batch: int, chunk_tokens: int | None) -> Any:
        found = list(real(engine, asked, batch=batch, chunk_tokens=chunk_tokens))
        assert all(reply.new_tokens <= 4 for reply in found)
        seen.append(([len(one.token_ids) for one in asked], batch, chunk_tokens))
        return iter(found)

    monkeypatch.setattr(answers_module, "replies", spy)
    benchmark_answers(
        AnswerSpeedConfig(
            shape="tiny", windows=(128,), prompts=3, new_tokens=4, batches=(2,), chunk_tokens=(64,), rounds=1,
            device="cpu",
        )
    )  # fmt: skip
    assert seen == [([32], 2, 64), ([124, 123, 122], 2, 64)] * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "name one of the two"),
        ({"shape": "tini"}, "did you mean 'tiny'"),
        ({"shape": "tiny", "prompts": 0}, "prompts = 0: use at least 1"),
        ({"shape": "tiny", "batches": ()}, r"batches = \[\]: give numbers of at least 1"),
        ({"shape": "tiny", "windows": (64,)}, r"windows = \[64\]: give lengths of at least 88 tokens"),
    ],
)
def test_sizes_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AnswerSpeedConfig(**changes)
