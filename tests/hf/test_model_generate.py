"""transformers' generate() on an extended model equals generate() on transformers' own statically scaled one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import WINDOW, statically_scaled, tiny_model, token_ids
from torch import nn

from e2llm.hf import install

NEW = 12
PROMPT = 70
"""Longer than the native window."""
STATIC = {
    "linear": {"rope_type": "linear"},
    "yarn": {"rope_type": "yarn", "original_max_position_embeddings": WINDOW},
}

STATIC_CACHE = {"cache_implementation": "static", "disable_compile": True}
"""Else generate() compiles the forward; the cache is what is tested here."""


def generate(model: nn.Module, ids: torch.Tensor, **arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """New tokens (B, NEW) and their logits (B, NEW, V), greedy."""
    settings = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW, "return_dict_in_generate": True}
    with torch.no_grad():
        found = model.generate(ids, output_logits=True, **settings, **arguments)
    return found.sequences[:, ids.shape[1] :], torch.stack(found.logits, 1)


def mask_of(ids: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, ids.shape[1] - length :] = 1
    return mask


@pytest.mark.parametrize("method", sorted(STATIC))
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_dynamic_cache(name: str, method: str) -> None:
    model, ids = tiny_model(name), token_ids(2, PROMPT)
    static = statically_scaled(model, factor=3.0, **STATIC[method])
    unscaled = generate(model, ids)
    install(model, method=method).set_scale(3.0)
    found, expected = generate(model, ids), generate(static, ids)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert not torch.equal(found[1], unscaled[1])


@pytest.mark.parametrize("method", sorted(STATIC))
def test_static_cache(method: str) -> None:
    model, ids = tiny_model("llama"), token_ids(2, PROMPT)
    static = statically_scaled(model, factor=3.0, **STATIC[method])
    install(model, method=method).set_scale(3.0)
    found, expected = generate(model, ids, **STATIC_CACHE), generate(static, ids, **STATIC_CACHE)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_null_plan() -> None:
    model, ids = tiny_model("llama"), token_ids(2, PROMPT)
    expected = generate(model, ids)
    install(model).set_scale(1.0)
    found = generate(model, ids)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("cache", [{}, STATIC_CACHE], ids=["dynamic", "static"])
def test_left_padded_rows_with_a_scale_each(cache: dict) -> None:
    """Requests of three lengths and scales in one batch: each row is the one its own static model generates."""
    lengths, scales = [PROMPT, 40, 17], [3.0, 2.0, 1.0]
    model, ids = tiny_model("llama"), token_ids(3, PROMPT)
    mask = mask_of(ids, lengths)
    ids = ids.masked_fill(mask == 0, 0)
    install(model, method="linear").set_scale(scales)
    tokens, found = generate(model, ids, attention_mask=mask, **cache)
    for row, (length, scale) in enumerate(zip(lengths, scales, strict=True)):
        static = statically_scaled(model_without_wrapper(), rope_type="linear", factor=scale)
        in_batch = generate(static, ids, attention_mask=mask, **cache)
        assert torch.equal(tokens[row], in_batch[0][row]) and torch.equal(found[row], in_batch[1][row])
        alone = generate(static, ids[row : row + 1, PROMPT - length :], **cache)
        assert torch.equal(tokens[row], alone[0][0]), "padding and neighbours change no token"
        torch.testing.assert_close(found[row], alone[1][0], rtol=0, atol=1e-4)


def model_without_wrapper() -> nn.Module:
    return tiny_model("llama")


def test_beams_keep_one_scale() -> None:
    model, ids = tiny_model("llama"), token_ids(2, PROMPT)
    static = statically_scaled(model, rope_type="linear", factor=2.0)
    extension = install(model, method="linear")
    extension.set_scale(2.0)
    settings = {"do_sample": False, "num_beams": 3, "max_new_tokens": 6}
    with torch.no_grad():
        assert torch.equal(model.generate(ids, **settings), static.generate(ids, **settings))
        extension.set_scale([2.0, 4.0])
        with pytest.raises(ValueError, match="scales are set for 2 rows, the batch has 6"):
            model.generate(ids, **settings)
