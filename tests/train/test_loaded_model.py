"""Several runs of one loaded model in one process."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from tiny_run import make_base, small

from e2llm.data import build_corpus
from e2llm.hf import get_extension, load_model
from e2llm.train import train_loaded


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("pieces", [32, 0])
def test_each_run_of_a_loaded_model_has_its_own_arithmetic(base: Path, tmp_path: Path, pieces: int) -> None:
    """Accelerate's autocast neither stays on the model nor is missing in the next run."""
    first = small(base, tmp_path / "0", f"train.logits_tokens={pieces}", "train.steps=1", "train.evaluate_windows=0")
    model, tokenizer, _ = load_model(str(base / "model"), dtype="float32", device="cpu", attention=first.attention)
    corpus = build_corpus(first.data, tokenizer, cache_dir=Path(first.data.cache_dir), progress=False)
    computed: list[torch.dtype] = []

    def note(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> None:
        if module.training and torch.is_grad_enabled():
            computed.append(output.dtype)

    model.model.layers[0].mlp.down_proj.register_forward_hook(note)
    for index, precision in enumerate(("bfloat16", "bfloat16", "float32", "bfloat16")):
        train_config = dataclasses.replace(first.train, precision=precision)
        run = dataclasses.replace(first, output=str(tmp_path / str(index)), train=train_config)
        train_loaded(run, model, tokenizer, corpus, quiet=True)
        assert set(computed) == {getattr(torch, precision)}
        computed.clear()
        extension = get_extension(model)
        assert extension is not None
        extension.set_scale(1.0)
        ids = torch.arange(3, 19)[None]
        assert model(ids).logits.dtype == torch.float32 == model.model(ids).last_hidden_state.dtype
        model.train()
        model(ids)
        assert set(computed) == {torch.float32}  # afterwards it is the model that it was
        computed.clear()
