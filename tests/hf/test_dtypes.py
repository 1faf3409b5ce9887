"""Rows with a scale and places of their own, forward and backward, in each type: against float64 by the papers'
formulas, and against float32 with each row in a batch of its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from architectures import WINDOW, tiny_model, token_ids
from drawn_rows import ROWS, TOKENS
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from e2llm.hf import get_extension, install
from e2llm.positions import oracle
from e2llm.positions.placement import Placement

HEAD = 16
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", ["linear", "yarn"])
def test_queries_and_their_gradients_turn_by_each_rows_tables(method: str, dtype: torch.dtype) -> None:
    """What is turned by R has the gradient turned by its transpose. Tables are made in float32 and rounded once: the
    angle of the last of two thousand places would be lost in 16 bits."""
    model = tiny_model("llama")
    extension = install(model, method=method)
    extension.place(ROWS)
    assert len({row.scale for row in ROWS}) == 4 and max(row.positions.max() for row in ROWS) > 1000
    generator = torch.Generator().manual_seed(2)
    query, key, into_query, into_key = torch.randn(4, len(ROWS), 2, TOKENS, HEAD, generator=generator).to(dtype)
    query.requires_grad_()
    key.requires_grad_()
    ids = torch.arange(TOKENS)[None]
    cos, sin = model.model.rotary_emb(torch.zeros(len(ROWS), TOKENS, 1, dtype=dtype), ids)
    assert cos.dtype == dtype
    turned = apply_rotary_pos_emb(query, key, cos, sin)
    torch.autograd.backward(turned, (into_query, into_key))
    for number, row in enumerate(ROWS):
        if method == "yarn":
            inv_freq = oracle.yarn_inv_freq(1e4, HEAD, row.scale, WINDOW)
            ratio = oracle.yarn_attention_scale(row.scale)
        else:
            inv_freq, ratio = oracle.linear_inv_freq(1e4, HEAD, row.scale), 1.0
        exact = oracle.rotation_tables(inv_freq, row.positions, ratio)
        # of an angle in float32, and of tables, products and their sum
        allowed = ratio * (row.positions.max() * inv_freq[0] * 2**-22 + 4 * torch.finfo(dtype).eps)
        for given, found, sign in (
            (query, turned[0], 1), (key, turned[1], 1), (into_query, query.grad, -1), (into_key, key.grad, -1),
        ):  # fmt: skip
            x = given[number].detach().double().numpy()
            expected = oracle.rotate_half_split(x, exact[0], sign * exact[1])
            error = np.abs(found[number].detach().double().numpy() - expected)
            assert (error <= allowed * np.abs(x).max()).all(), (number, error.max())


def gradients(model: nn.Module, ids: torch.Tensor, rows: list[Placement]) -> dict[str, torch.Tensor]:
    """Of the mean loss over all rows, as float32. The loss is multiplied so that float16 holds small gradients too."""
    model.zero_grad()
    get_extension(model).place(rows)
    model(input_ids=ids, labels=ids, use_cache=False).loss.mul(256).backward()
    return {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.bfloat16, 0.05), (torch.float16, 0.008)], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi", "cohere", "glm4"])
def test_gradients_of_16_bit_models_are_those_of_single_rows_in_float32(
    family: str, dtype: torch.dtype, allowed: float
) -> None:
    """Pairs of channels are halves of a head apart or neighbours, and phi and glm4 turn a part of them."""
    low, plain = tiny_model(family).train(), tiny_model(family).train()
    for model in (low, plain):
        install(model, method="yarn")
    low.to(dtype)
    plain.load_state_dict(low.state_dict())  # rounded alike
    ids = token_ids(len(ROWS), TOKENS)
    found = gradients(low, ids, ROWS)
    single = [gradients(plain, ids[n : n + 1], [row]) for n, row in enumerate(ROWS)]
    swapped = gradients(plain, ids, ROWS[1:] + ROWS[:1])
    seen = 0.0
    for name in found:
        expected = torch.stack([of_row[name] for of_row in single]).mean(0)
        error, of_swapped = ((g[name] - expected).norm() / expected.norm() for g in (found, swapped))
        assert error < allowed, (name, error)
        seen = max(seen, of_swapped.item())
    assert seen > 0.5, "rows that change places would be seen"
