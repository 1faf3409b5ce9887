"""Answers that count for more: their weights reach the loss of a run, of adapters and with gradients added up too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_run import logged, make_base, small

from e2llm.hf import chunked_loss
from e2llm.hf.chunked_loss import IGNORED, summed_nats
from e2llm.train import train


@pytest.mark.parametrize(("accumulated", "rank"), [(1, 0), (2, 0), (1, 4)])
def test_weights_reach_the_loss(accumulated: int, rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "base").mkdir()
    base = make_base(tmp_path / "base")
    for file in (base / "text").iterdir():  # facts stand between lines
        file.write_text(file.read_text().replace(" w", "\nw", 40))
    seen: list[tuple[float, int, torch.Tensor]] = []

    def spy(
        logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if logits.requires_grad or weights is not None:
            assert weights is not None, "a training batch arrived without its weights"
            nats = F.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="none")
            seen.append((float((nats * weights).sum()), int((targets != IGNORED).sum()), weights))
        return summed_nats(logits, targets, weights)

    monkeypatch.setattr(chunked_loss, "summed_nats", spy)
    more = ("data.window=640", "data.planted=1", "data.planted_sets=1", "data.planted_weight=4", "train.steps=2")
    more += (f"train.gradient_accumulation={accumulated}", f"lora.rank={rank}")
    more += ("train.evaluate_windows=0", "train.logits_tokens=100000")
    result = train(small(base, tmp_path / "run", *more), quiet=True)
    assert len(seen) == 2 * accumulated and any((weights == 4).any() for _, _, weights in seen)
    losses = list(logged(result.folder, "loss").values())
    for step, found in enumerate(losses):
        mine = seen[accumulated * step : accumulated * (step + 1)]
        assert found == pytest.approx(sum(nats for nats, _, _ in mine) / sum(n for _, n, _ in mine), rel=1e-4)
    assert len(losses) == 2
