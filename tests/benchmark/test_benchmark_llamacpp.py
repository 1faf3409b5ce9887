"""The two engines on one machine: what is measured, and that both made the tokens they are credited with."""

from __future__ import annotations

from pathlib import Path

import pytest

from e2llm.benchmark.llamacpp import Config, main
from e2llm.quickstart import TINY
from e2llm.records import Record


@pytest.mark.parametrize(("field", "value"), [("rounds", 0), ("new_tokens", 1), ("scales", ()), ("scales", (0.5,))])
def test_sizes_that_make_no_sense(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        Config(model="m", **{field: value})  # type: ignore[arg-type]


def test_both_engines_take_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed; see scripts/ci_llamacpp.sh")
    monkeypatch.chdir(tmp_path)
    arguments = ["--prompt-tokens", "24", "--new-tokens", "6", "--requests", "3", "--rounds", "2", "--threads", "1"]
    assert main([str(TINY), *arguments, "--base-model", "tiny", "--out", "r.json"]) == 0
    record = Record.load("r.json")
    rows = {(row["engine"], row["mix"], row["metric"]): row for row in record.rows}
    assert {key[:2] for key in rows} == {(e, m) for e in ("e2llm", "llamacpp") for m in ("single", "mixed")}
    assert len(rows) == 4 * 3 + 2 and all(row["value"] > 0 and row["n"] == 2 for row in rows.values())
    ratio = rows["llamacpp", "single", "ratio_to_e2llm"]
    each = [
        {
            e["round"]: e["value"]
            for e in record.examples
            if (e["engine"], e["mix"]) == (engine, "single") and e["metric"] == "output_tokens_per_second"
        }
        for engine in ("llamacpp", "e2llm")
    ]
    assert ratio["value"] == pytest.approx(sum(each[0][i] / each[1][i] for i in (0, 1)) / 2)
    assert record.config["threads"] == 1 and record.config["model"] == "tiny-512" and ratio["window"] == 30
    assert "llamacpp  mixed" in capsys.readouterr().out
    assert main(["nowhere/at/all", "--rounds", "0"]) == 2
