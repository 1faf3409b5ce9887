"""SelfExtend's attention equals a plain one written from the paper, T × T and with positions given to each pair."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import WINDOW, tiny_model, token_ids

from e2llm.hf import get_extension
from e2llm.hf.self_extend import SelfExtend, get_self_extend, rotate, self_extend
from e2llm.infer import Engine

NEIGHBOURS = 10


def plain_logits(model: Any, ids: torch.Tensor, group: int, neighbours: int) -> torch.Tensor:
    """Llama's forward pass by hand: near pairs at their positions, far ones at their groups' (Jin et al. 2024,
    Algorithm 1)."""
    config, body = model.config, model.model
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    length = ids.shape[1]
    places = torch.arange(length)
    inv_freq = 1.0 / config.rope_parameters["rope_theta"] ** (torch.arange(0, dim, 2) / dim)

    def turned(x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        angles = torch.cat([at[:, None] * inv_freq] * 2, dim=-1)
        a, b = x.chunk(2, dim=-1)
        return x * angles.cos() + torch.cat((-b, a), dim=-1) * angles.sin()

    hidden = body.embed_tokens(ids)
    for layer in body.layers:
        attention, x = layer.self_attn, layer.input_layernorm(hidden)
        q = attention.q_proj(x).view(1, length, heads, dim).transpose(1, 2)
        k = attention.k_proj(x).view(1, length, kv_heads, dim).transpose(1, 2).repeat_interleave(heads // kv_heads, 1)
        v = attention.v_proj(x).view(1, length, kv_heads, dim).transpose(1, 2).repeat_interleave(heads // kv_heads, 1)
        near = turned(q, places.float()) @ turned(k, places.float()).transpose(-1, -2)
        far_q = turned(q, (places // group + neighbours - neighbours // group).float())
        far = far_q @ turned(k, (places // group).float()).transpose(-1, -2)
        distance = places[:, None] - places[None]
        scores = torch.where(distance < neighbours, near, far) * dim**-0.5
        weights = scores.masked_fill(distance < 0, float("-inf")).softmax(-1)
        hidden = hidden + attention.o_proj((weights @ v).transpose(1, 2).reshape(1, length, -1))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.lm_head(body.norm(hidden))


@pytest.mark.parametrize("block", [1, 7, NEIGHBOURS, 64, 512, "kernels"])
@pytest.mark.parametrize("group", [1, 2, 3, 8])
@torch.no_grad()
def test_equals_the_plain_form(group: int, block: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if block != "kernels":
        monkeypatch.setattr("e2llm.hf.self_extend.BLOCK_QUERIES", block)
        monkeypatch.setattr("e2llm.hf.self_extend.has_kernels", lambda query: False)
    model = tiny_model("llama")
    ids = token_ids(1, 150)
    handle = self_extend(model, native_window=WINDOW, neighbours=NEIGHBOURS)
    handle.group = group
    expected = plain_logits(model, ids, group, NEIGHBOURS)
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    if group > 1:
        assert (plain_logits(model, ids, 1, NEIGHBOURS) - expected).abs().max() > 0.05  # the group counts


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt_neox", "glm", "cohere", "phi", "granite"])
@torch.no_grad()
def test_group_one_and_short_texts_are_the_model_as_it_was(model_type: str) -> None:
    model = tiny_model(model_type)
    ids = token_ids(2, 40)
    own = model(input_ids=ids).logits
    handle = self_extend(model, native_window=WINDOW, neighbours=NEIGHBOURS)
    torch.testing.assert_close(model(input_ids=ids).logits, own, rtol=1e-4, atol=1e-4)
    handle.group = 4
    torch.testing.assert_close(model(input_ids=ids[:, :NEIGHBOURS]).logits, own[:, :NEIGHBOURS], rtol=1e-4, atol=1e-4)
    assert (model(input_ids=ids).logits - own).abs().max() > 1e-3
    handle.remove()
    torch.testing.assert_close(model(input_ids=ids).logits, own)
    assert get_self_extend(model) is None


@torch.no_grad()
def test_chunks_over_a_cache_and_small_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    ids = token_ids(1, 100)
    handle = self_extend(model, native_window=WINDOW, neighbours=NEIGHBOURS)
    handle.group = 3
    whole = Engine(model, None).prefill(ids[0].tolist())[0]
    monkeypatch.setattr("e2llm.hf.self_extend.SCORE_ELEMENTS", 2000)
    chunked = Engine(model, None, chunk_tokens=17).prefill(ids[0].tolist())[0]
    torch.testing.assert_close(chunked, whole, rtol=1e-4, atol=1e-4)


def test_the_group_is_the_smallest_that_holds_the_window() -> None:
    handle = self_extend(tiny_model("llama"), native_window=64, neighbours=16)
    for window in (16, 64, 65, 112, 113, 500):
        group = handle.fit(window)
        assert (64 - 16) * group + 16 >= window
        assert group == 1 or (64 - 16) * (group - 1) + 16 < window


def test_what_cannot_be_extended_is_refused_and_left_as_it_was() -> None:
    model = tiny_model("gemma3_text")
    with pytest.raises(ValueError, match=r"gemma3_text.*sliding window"):
        self_extend(model, native_window=64)
    assert model.config._attn_implementation == "sdpa" and get_self_extend(model) is None
    with pytest.raises(ValueError, match="neighbours = 64"):
        SelfExtend(tiny_model("llama"), native_window=64, neighbours=64)


def test_rotations_add_up_and_leave_the_other_channels() -> None:
    x = torch.randn(2, 5, 12)
    inv_freq = torch.tensor([1.0, 0.1, 0.01, 0.001])
    for pairs in ("halves", "neighbours"):
        once = rotate(rotate(x, torch.full((5,), 3), inv_freq, pairs), torch.full((5,), -8), inv_freq, pairs)
        torch.testing.assert_close(once, rotate(x, torch.full((5,), -5), inv_freq, pairs))
        assert torch.equal(once[..., 8:], x[..., 8:])


def test_the_rotary_module_is_wrapped_once() -> None:
    model = tiny_model("llama")
    self_extend(model, native_window=64)
    extension = get_extension(model)
    assert extension is not None and extension.method == "none"
