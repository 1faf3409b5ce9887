"""TRL's own ways to join texts into one row, with its own trainer: each text draws for itself and sees only itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import e2llm
from e2llm.hf.documents import document_lengths
from e2llm.positions.frequencies import frequencies

TINY = Path(e2llm.__file__).parent / "assets" / "tiny-512"
WINDOW = 64
JOINED: dict[str, dict[str, Any]] = {
    "bfd": {"packing": True, "packing_strategy": "bfd", "max_length": WINDOW},
    "bfd_split": {"packing": True, "packing_strategy": "bfd_split", "max_length": WINDOW},
    "padding_free": {"padding_free": True, "max_length": None},
}
"""Way to join texts -> what TRL is told."""


def trained(folder: Path, options: dict[str, Any]) -> tuple[Any, list[dict[str, Any]]]:
    """The extension, and of each training forward: what the model was given, cos (B, T, D) and hidden states."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype="float32")
    extension = e2llm.extend(model, training_window=WINDOW)
    seen: list[dict[str, Any]] = []

    def given(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append({"input_ids": kwargs["input_ids"], "position_ids": kwargs.get("position_ids")})

    def first_layer(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen[-1]["cos"] = kwargs["position_embeddings"][0].detach().clone()

    def last_norm(module: Any, args: Any, output: torch.Tensor) -> None:
        seen[-1]["hidden"] = output.detach().clone()

    model.register_forward_pre_hook(given, with_kwargs=True)
    model.model.layers[0].register_forward_pre_hook(first_layer, with_kwargs=True)
    model.model.norm.register_forward_hook(last_norm)
    config = SFTConfig(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=3, learning_rate=1e-3, bf16=False,
        use_cpu=True, save_strategy="no", report_to="none", disable_tqdm=True, gradient_checkpointing=False, **options,
    )  # fmt: skip
    texts = Dataset.from_dict({"text": ["the value of x is y " * (1 + n % 4) for n in range(40)]})
    SFTTrainer(model=model, args=config, train_dataset=texts, processing_class=tokenizer).train()
    return extension, seen


@pytest.mark.parametrize("how", JOINED)
def test_texts_that_share_a_row_draw_for_themselves(tmp_path: Path, how: str) -> None:
    extension, seen = trained(tmp_path, JOINED[how])
    plain = AutoModelForCausalLM.from_pretrained(TINY)
    own = e2llm.extend(plain, training_window=WINDOW)
    number, scales = 0, set()
    for step, forward in enumerate(seen):
        lengths = document_lengths(forward["position_ids"], 1)
        assert lengths is not None and len(lengths[0]) > 1 and forward["cos"].shape[0] == 1, "several texts, one row"
        start = 0
        for length in lengths[0]:
            draw = extension.sampler.draw_document(number, length)
            table = frequencies(own.rope, "yarn", draw.scale, own.attention.training_slope)
            cos = (torch.from_numpy(draw.positions)[:, None].float() * table.inv_freq).cos() * table.attention_scale
            here = slice(start, start + length)
            torch.testing.assert_close(forward["cos"][0, here, : cos.shape[1]], cos, atol=1e-4, rtol=0)
            if step == 0:  # before the first update: the base's weights
                alone = hidden_alone(forward["input_ids"][:, here], draw)
                torch.testing.assert_close(forward["hidden"][:, here], alone, atol=2e-4, rtol=1e-3)
            start, number = start + length, number + 1
            scales.add(draw.scale)
    assert len(seen) == 3 and len(scales) > 2


def hidden_alone(ids: torch.Tensor, draw: Any) -> torch.Tensor:
    """Hidden states (1, T, width) of one text in a row of its own, placed by `draw`."""
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype="float32").train()
    extension = e2llm.extend(model, training_window=WINDOW)
    extension.sampler = None
    extension.place([draw])
    with torch.no_grad():
        return model.model(input_ids=ids, use_cache=False).last_hidden_state
