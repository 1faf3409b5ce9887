"""Documents kept apart by whole masks: what is said of it, who says it, and training without them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny_model
from tiny_run import logged, make_base, small

import e2llm.train.run as run
from e2llm.hf import install
from e2llm.train import train
from e2llm.train.distributed import Processes
from e2llm.train.masks import tell_of_slow_attention


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


MASK, NEAR = "data.document_mask=true", "placement.far_weight=0"


@pytest.mark.parametrize(
    ("settings", "attention", "processes", "told"),
    [
        ((MASK, NEAR), "sdpa", Processes(), "model.attn_implementation=flex_attention holds none"),
        ((MASK,), "sdpa", Processes(), "=flex_attention and placement.far_weight=0, which it cannot weigh holds none"),
        ((MASK,), "flex_attention", Processes(), ""),
        (("train.precision=bfloat16",), "sdpa", Processes(), ""),
        ((MASK,), "sdpa", Processes(rank=1, world=2, local_rank=1, local_world=2, launched=True), ""),
    ],
)
def test_a_slower_attention_is_said(
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    settings: tuple[str, ...],
    attention: str,
    processes: Processes,
    told: str,
) -> None:
    model, recipe = tiny_model("llama", attn_implementation=attention), small(base, tmp_path, *settings)
    install(model)
    tell_of_slow_attention(recipe, model, processes)
    assert not caplog.records, "a CPU has no faster one"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    tell_of_slow_attention(recipe, model, processes)
    assert bool(told) == bool(caplog.records) and told in caplog.text
    if told:
        assert "a mask of 48 x 48 for each row" in caplog.text


@pytest.mark.parametrize(
    ("precision", "keys", "attention", "told"),
    [("float32", 2, "sdpa", True), ("bfloat16", 2, "sdpa", False), ("float32", 4, "sdpa", False),
     ("float32", 2, "eager", False)],
)  # fmt: skip
def test_float32_without_a_kernel_is_said(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    precision: str, keys: int, attention: str, told: bool,
) -> None:  # fmt: skip
    model = tiny_model("llama", attn_implementation=attention, num_key_value_heads=keys)
    recipe = small(base, tmp_path, f"train.precision={precision}")
    tell_of_slow_attention(recipe, model, Processes())
    assert not caplog.records
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    tell_of_slow_attention(recipe, model, Processes())
    expected = "where 4 heads share 2 of keys, and holds scores of 48 x 48 for each head; train.precision=bfloat16"
    assert (expected in caplog.text) == bool(caplog.records) == told


def test_training_says_it_before_attention_has_another_name(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def tell(recipe: Any, model: Any, processes: Processes) -> None:
        asked.append(model.config._attn_implementation)

    monkeypatch.setattr(run, "tell_of_slow_attention", tell)
    recipe = small(base, tmp_path / "run", MASK, "train.steps=1")
    assert recipe.placement.far_weight
    train(recipe, quiet=True)
    assert asked == ["sdpa"]


def losses_of(base: Path, folder: Path, attention: str, *more: str) -> dict[int, float]:
    """Of some steps over windows of several documents each, scales and offsets drawn for each window."""
    words = (base / "text" / "0.txt").read_text().split()
    lines = [json.dumps({"text": " ".join(words[start : start + 30])}) for start in range(0, 390, 30)]
    (folder / "short.jsonl").write_text("\n".join(lines))
    recipe = small(
        base, folder / attention, MASK, NEAR, f"model.attn_implementation={attention}",
        f'data.sources=[{{path="{folder / "short.jsonl"}"}}]', "data.window=160", "data.held_out_fraction=0",
        "train.evaluate_windows=0", "train.learning_rate=5e-3", *more,
    )  # fmt: skip
    train(recipe, quiet=True)
    return logged(folder / attention, "loss")


@pytest.mark.usefixtures("plain_flex")
def test_flex_attention_trains_as_sdpa_does(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole trainer: its loss in pieces, its labels, its placements. On a CPU by PyTorch's plain form."""
    monkeypatch.setattr(run, "check_packages", lambda recipe: None)  # which refuses it here
    expected, found = (losses_of(base, tmp_path, attention) for attention in ("sdpa", "flex_attention"))
    assert len(expected) == 6 and found == pytest.approx(expected, abs=2e-5)
    together = losses_of(base, tmp_path, "eager", "data.document_mask=false")
    assert abs(together[1] - expected[1]) > 1e-3, "without masks it is another loss"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")
@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask")
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("compiled", ["none", "layers"])
def test_compiled_flex_attention_trains_as_sdpa_does(base: Path, tmp_path: Path, compiled: str) -> None:
    """The fast path: bfloat16 weights with masters cut in two, Triton's kernels."""
    fast = ("model.dtype=bfloat16", "train.precision=bfloat16", "train.optimizer=adamw_split")
    more = (*fast, f"train.compile={compiled}", "train.learning_rate=1e-4")
    expected, found = (losses_of(base, tmp_path, attention, *more) for attention in ("sdpa", "flex_attention"))
    assert len(expected) == 6 and found == pytest.approx(expected, abs=1e-3)  # without masks up to 4e-3 apart
