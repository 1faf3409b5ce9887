"""Steps on a CUDA device: `pytest -m gpu tests/train/test_steps_gpu.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import make_base, small
from transformers import TrainerCallback

from e2llm.data import build_corpus
from e2llm.hf import load_model
from e2llm.train import train_loaded

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # What torch says once: that its debug mode is a prototype, and that it makes a context.
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS"),
]


class NoWaiting(TrainerCallback):
    """Makes every wait of the host for the device an error, in the steps between two log lines."""

    steps = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if 2 <= state.global_step < 5:  # the first ones compile and make what stays
            torch.cuda.set_sync_debug_mode("error")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps += torch.cuda.get_sync_debug_mode() == 2
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_split"])
def test_no_step_waits_for_the_device(optimizer: str, tmp_path: Path) -> None:
    split = ("model.dtype=bfloat16",) if optimizer == "adamw_split" else ()
    base = make_base(tmp_path)
    recipe = small(
        base, tmp_path / "run", f"train.optimizer={optimizer}", *split, "train.precision=bfloat16",
        "train.evaluate_windows=0", "train.evaluate_every=0", "train.log_every=6",
    )  # fmt: skip
    model, tokenizer, _ = load_model(
        recipe.model.name,
        dtype=recipe.model.dtype,
        device="cuda",
        method=recipe.method,
        attention=recipe.attention,
    )
    corpus = build_corpus(recipe.data, tokenizer, cache_dir=Path(recipe.data.cache_dir), progress=False)
    callback = NoWaiting()
    try:
        train_loaded(recipe, model, tokenizer, corpus, quiet=True, callbacks=[callback])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert callback.steps == 3
