"""The benchmark of sliding-window perplexity: FLOPs against torch's own counter, a whole run, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from e2llm.benchmark.evaluate import EvaluateSpeedConfig, window_flops
from e2llm.benchmark.shapes import shape_of
from e2llm.cli import main
from e2llm.records import Record


def test_flops_of_a_window_equal_torchs_count_with_half_of_the_attention() -> None:
    shape = shape_of("tiny")
    model: Any = AutoModelForCausalLM.from_config(shape.config(), attn_implementation="eager")
    window, scored = 96, 32
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.zeros(1, window, dtype=torch.long), logits_to_keep=scored)
    counts = counter.get_flop_counts()
    by_operation = {str(op): n for op, n in counts["Global"].items()}
    # Some versions of transformers make the angles by a matrix product too.
    angles = sum(sum(found.values()) for module, found in counts.items() if module.endswith(".rotary_emb"))
    attention = by_operation.pop("aten.bmm") - angles
    assert window_flops(model, window, scored) == sum(by_operation.values()) + attention / 2


def test_a_run_writes_a_record_as_it_goes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "speed.json"
    sizes = ["--windows", "256", "512", "--stride", "32", "--steps", "2", "--rounds", "2", "--compile", "none"]
    assert main(["benchmark", "evaluate", "--shape", "tiny", *sizes, "--device", "cpu", "--out", str(out)]) == 0
    record = Record.load(out)
    assert record.kind == "evaluate_speed" and record.config["shape"] == "tiny"
    found = {(row["window"], row["metric"]): row for row in record.rows}
    assert {window for window, _ in found} == {256, 512}
    for window in (256, 512):
        seconds, speed = (found[window, name]["value"] for name in ("seconds_per_window", "tokens_per_second"))
        assert speed == pytest.approx(window / seconds, rel=0.5)  # medians of two rounds each
        assert found[window, "ratio_to_floor"]["n"] == 2 and found[window, "ratio_to_floor"]["value"] > 0
    for row in record.rows:  # of two rounds: their ends, as a draw of both, one twice or the other
        rounds = [e["value"] for e in record.examples if (e["window"], e["metric"]) == (row["window"], row["metric"])]
        assert (row["low"], row["high"]) == (min(rounds), max(rounds))
    assert (256, "model_flops_utilization") not in found, "a share of a GPU's peak, on a GPU only"
    assert "tokens_per_second" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "name one of the two"),
        ({"model": "somewhere", "shape": "tiny"}, "name one of the two"),
        ({"shape": "tini"}, "did you mean 'tiny'"),
        ({"shape": "tiny", "windows": (256,)}, r"windows = \[256\]: give lengths above the stride \(256\)"),
        ({"shape": "tiny", "steps": 0}, "steps = 0: use at least 1"),
        ({"shape": "tiny", "compile": ("all",)}, "use none, layers or both"),
    ],
)
def test_sizes_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvaluateSpeedConfig(**changes)


@pytest.mark.gpu
def test_on_a_gpu_the_share_of_peak_is_said(tmp_path: Path) -> None:
    out = tmp_path / "speed.json"
    sizes = ["--windows", "2k", "--steps", "2", "--rounds", "1"]
    assert main(["benchmark", "evaluate", "--shape", "smollm2-135m", *sizes, "--out", str(out)]) == 0
    shares = [row["value"] for row in Record.load(out).rows if row["metric"] == "model_flops_utilization"]
    assert len(shares) == 2 and all(0 < share < 1 for share in shares)
