"""SelfExtend's attention equals a plain one written from the paper, T × T and with positions given to each pair."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import WINDOW, tiny_model, token_ids

from e2llm.hf import Extension, get_extension, install
from e2llm.hf.group_tables import rotate
from e2llm.infer import Engine
from e2llm.positions.groups import group_of, group_of_scale
from e2llm.positions.placement import PlacementConfig, PositionSampler
from e2llm.positions.scales import ScalesConfig

NEIGHBOURS = 10


def extended(model: Any, neighbours: int | None = NEIGHBOURS) -> Extension:
    return install(model, method="self_extend", native_window=WINDOW, neighbours=neighbours)


def scale_of(group: int, neighbours: int = NEIGHBOURS) -> float:
    """The largest scale that has this group."""
    return ((WINDOW - neighbours) * group + neighbours) / WINDOW


def plain_logits(
    model: Any,
    ids: torch.Tensor,
    group: int,
    neighbours: int,
    places: torch.Tensor | None = None,
    added: torch.Tensor | None = None,
) -> torch.Tensor:
    """Llama's forward pass by hand: near pairs at their positions, far ones at their groups' (Jin et al. 2024,
    Algorithm 1). added: (T, T), of scores."""
    config, body = model.config, model.model
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    length = ids.shape[1]
    places = torch.arange(length) if places is None else places
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
        scores = torch.where((distance < neighbours) | torch.tensor(group == 1), near, far) * dim**-0.5
        scores = scores if added is None else scores + added
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
    extended(model).set_scale(scale_of(group))
    expected = plain_logits(model, ids, group, NEIGHBOURS)
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    if group > 1:
        assert (plain_logits(model, ids, 1, NEIGHBOURS) - expected).abs().max() > 0.05  # the group counts


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt_neox", "glm", "cohere", "phi", "granite"])
@torch.no_grad()
def test_scale_one_and_short_texts_are_the_model_as_it_was(model_type: str) -> None:
    model = tiny_model(model_type)
    ids = token_ids(2, 40)
    own = model(input_ids=ids).logits
    extension = extended(model)
    for scale in (None, 1.0):
        extension.set_scale(scale)
        torch.testing.assert_close(model(input_ids=ids).logits, own, rtol=1e-4, atol=1e-4)
    extension.set_scale(4)
    torch.testing.assert_close(model(input_ids=ids[:, :NEIGHBOURS]).logits, own[:, :NEIGHBOURS], rtol=1e-4, atol=1e-4)
    assert (model(input_ids=ids).logits - own).abs().max() > 1e-3
    extension.remove()
    assert model.config._attn_implementation == "sdpa" and get_extension(model) is None
    assert model(input_ids=ids).logits.equal(own)


@torch.no_grad()
def test_each_row_has_its_own_scale() -> None:
    model = tiny_model("llama")
    ids = token_ids(3, 60)
    extension = extended(model)
    alone = []
    for row, group in enumerate((1, 3, 5)):
        extension.set_scale(scale_of(group))
        alone.append(model(input_ids=ids[row : row + 1]).logits)
    extension.set_scale([scale_of(group) for group in (1, 3, 5)])
    torch.testing.assert_close(model(input_ids=ids).logits, torch.cat(alone), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="scales are set for 3 rows, the batch has 2"):
        model(input_ids=ids[:2])


@torch.no_grad()
def test_chunks_over_a_cache_and_small_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    ids = token_ids(1, 100)
    extended(model).set_scale(scale_of(3))
    whole = Engine(model, None).prefill(ids[0].tolist())[0]
    monkeypatch.setattr("e2llm.hf.self_extend.SCORE_ELEMENTS", 2000)
    chunked = Engine(model, None, chunk_tokens=17).prefill(ids[0].tolist())[0]
    torch.testing.assert_close(chunked, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", ["llama", "glm", "gemma3_text"])
def test_a_training_window_at_its_own_places_is_a_served_one(model_type: str) -> None:
    """A placement of the whole window: gradients on, through another attention, and the same logits."""
    model = (gemma() if model_type == "gemma3_text" else tiny_model(model_type)).train()
    ids = token_ids(2, 80)
    extension = extended(model)
    sampler = PositionSampler(
        native_window=WINDOW,
        training_window=80,
        scales=ScalesConfig(distribution="fixed", max_scale=3),
        placement=PlacementConfig(kind="none"),
        seed=0,
    )
    extension.place([sampler.draw(index, 80) for index in range(2)])
    trained = model(input_ids=ids).logits
    trained.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with torch.no_grad():
        extension.set_scale(3)
        torch.testing.assert_close(model(input_ids=ids).logits, trained, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("far_weight", [0.0, 1.0])
def test_a_placed_window_is_that_of_the_plain_form(far_weight: float) -> None:
    model = tiny_model("llama")
    ids = token_ids(3, 60)
    extension = extended(model)
    sampler = PositionSampler(
        native_window=WINDOW,
        training_window=60,
        scales=ScalesConfig(distribution="weighted", max_scale=8, values=(1, 4, 8), weights=(1, 1, 1)),
        placement=PlacementConfig(kind="jumps", max_jumps=5, leading_tokens=4, far_weight=far_weight),
        seed=3,
    )
    drawn = [sampler.draw(index, 60) for index in range(3)]
    assert len({placement.scale for placement in drawn}) > 1
    extension.place(drawn)
    found = model(input_ids=ids).logits
    for row, placement in enumerate(drawn):
        group = group_of_scale(placement.scale, WINDOW, NEIGHBOURS)
        added = torch.zeros(60, 60)
        if placement.far is not None:
            segments, bias = torch.tensor(placement.far.segments), torch.tensor(placement.far.bias)
            near = (segments[:, None] == segments) | (torch.arange(60) < placement.far.leading_tokens)
            added = -bias[:, None] * near
        places = torch.tensor(placement.positions)
        expected = plain_logits(model, ids[row : row + 1], group, NEIGHBOURS, places, added)[0]
        torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-4)


def test_the_group_is_the_smallest_that_holds_the_window() -> None:
    for window in (16, 64, 65, 112, 113, 500):
        group = group_of(window, 64, 16)
        assert (64 - 16) * group + 16 >= window
        assert group == 1 or (64 - 16) * (group - 1) + 16 < window
    assert [group_of_scale(scale, 8192, 2048) for scale in (1, 2, 4, 8, 16, 32)] == [1, 3, 5, 11, 21, 43]
    assert group_of_scale(0.1 * 30, 1000, 250) == group_of(3000, 1000, 250)  # 3.0000000000000004


def gemma(**more: Any) -> Any:
    return tiny_model("gemma3_text", sliding_window=16, **more)


def only_full_layers(model: Any) -> Any:
    """A Gemma of layers of full attention alone, with the weights of one whose first layer is local."""
    other = tiny_model("gemma3_text", layer_types=["full_attention"] * 2)
    other.load_state_dict(model.state_dict())
    return other


@torch.no_grad()
def test_local_layers_stay_as_they_were() -> None:
    model = gemma()
    assert model.config.layer_types == ["sliding_attention", "full_attention"]
    ids = token_ids(2, 100)
    own = model(input_ids=ids).logits
    extension = extended(model)
    torch.testing.assert_close(model(input_ids=ids).logits, own, rtol=1e-4, atol=1e-4)
    extension.set_scale(4)
    found = model(input_ids=ids).logits
    assert (found - own).abs().max() > 1e-3
    mask = torch.ones_like(ids)
    mask[1, 80:] = 0
    torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).logits[1, :80], found[1, :80])
    padded, mask = torch.cat((ids.new_zeros(2, 9), ids), 1), torch.cat((ids.new_zeros(2, 9), torch.ones_like(ids)), 1)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    before = model(input_ids=padded, attention_mask=mask, position_ids=places).logits[:, 9:]
    torch.testing.assert_close(before, found, rtol=1e-4, atol=1e-4)
    whole = Engine(model, None).prefill(ids[0].tolist())[0]
    chunked = Engine(model, None, chunk_tokens=17).prefill(ids[0].tolist())[0]  # over a cache that forgets
    torch.testing.assert_close(chunked, whole, rtol=1e-4, atol=1e-4)
    # The second layer is grouped: hidden states into it are the model's own, and what it makes of them is another's.
    full = only_full_layers(model)
    extended(full).set_scale(4)
    states = [one(input_ids=ids, output_hidden_states=True).hidden_states for one in (model, full)]
    layer, same = full.model.layers[1], states[0][1]
    assert (states[0][1] - states[1][1]).abs().max() > 1e-3, "the local layer of the one is a full one of the other"
    swapped = layer.register_forward_pre_hook(lambda module, args: (same, *args[1:]))
    try:
        moved = full.model(input_ids=ids).last_hidden_state
    finally:
        swapped.remove()
    torch.testing.assert_close(moved, model.model(input_ids=ids).last_hidden_state, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_extended_is_refused_and_left_as_it_was() -> None:
    model = tiny_model("mistral", sliding_window=16)
    rotary = model.model.rotary_emb
    with pytest.raises(ValueError, match=r"mistral.*not every layer of full attention"):
        install(model, method="self_extend", native_window=64)
    assert model.config._attn_implementation == "sdpa" and get_extension(model) is None
    assert model.model.rotary_emb is rotary
    with pytest.raises(ValueError, match="neighbours = 64"):
        extended(tiny_model("llama"), neighbours=WINDOW)
    with pytest.raises(ValueError, match="neighbours = 8: only method self_extend"):
        install(tiny_model("llama"), method="yarn", neighbours=8)


@torch.no_grad()
def test_padding_is_no_text() -> None:
    model = tiny_model("llama")
    ids = token_ids(2, 40)
    extension = extended(model)
    extension.set_scale(2)
    whole = model(input_ids=ids).logits
    mask = torch.ones_like(ids)
    mask[1, 30:] = 0
    behind = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(behind[1, :30], whole[1, :30])
    torch.testing.assert_close(behind[0], whole[0])
    padded = torch.cat((ids.new_zeros(2, 25), ids), 1)
    padded[0, :25] = ids[0, :25]
    mask = (torch.arange(65) >= torch.tensor([[0], [25]])).long()
    places = (mask.cumsum(1) - 1).clamp(min=0)
    before = model(input_ids=padded, attention_mask=mask, position_ids=places).logits
    torch.testing.assert_close(before[1, 25:], whole[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(before[:1], model(input_ids=padded[:1]).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_generate_pads_before_its_prompts() -> None:
    model = tiny_model("llama")
    extended(model).set_scale(4)
    long, short = token_ids(2, 50)
    asked = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    alone = model.generate(short[None, 20:], attention_mask=torch.ones(1, 30, dtype=torch.long), **asked)[0, 30:]
    mask = (torch.arange(50) >= torch.tensor([[0], [20]])).long()
    both = model.generate(torch.stack((long, short.where(mask[1] == 1, 0))), attention_mask=mask, **asked)
    assert both[1, 50:].tolist() == alone.tolist()


@torch.no_grad()
def test_caches_of_fixed_length_are_refused() -> None:
    model = tiny_model("llama")
    extended(model).set_scale(4)
    with pytest.raises(ValueError, match='cache_implementation = "dynamic"'):
        model.generate(token_ids(1, 30), max_new_tokens=4, cache_implementation="static", pad_token_id=0)


def test_training_takes_padding_behind_its_text_only() -> None:
    model = tiny_model("llama").train()
    extension = extended(model)
    extension.sampler = PositionSampler(
        native_window=WINDOW,
        training_window=40,
        scales=ScalesConfig(distribution="fixed", max_scale=4),
        placement=PlacementConfig(kind="jumps"),
        seed=0,
    )
    ids, mask = token_ids(1, 40), torch.ones(1, 40, dtype=torch.long)
    extension.expect([0])
    whole = model(input_ids=ids).logits
    mask[:, 30:] = 0
    extension.expect([0])
    torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).logits[:, :30], whole[:, :30])
    with pytest.raises(ValueError, match="attention_mask: training in groups knows no padding before"):
        model(input_ids=ids, attention_mask=mask.flip(1))


def test_rotations_add_up_and_leave_the_other_channels() -> None:
    x = torch.randn(2, 5, 12)
    inv_freq = torch.tensor([1.0, 0.1, 0.01, 0.001])
    for pairs in ("halves", "neighbours"):
        once = rotate(rotate(x, torch.full((5,), 3), inv_freq, pairs), torch.full((5,), -8), inv_freq, pairs)
        torch.testing.assert_close(once, rotate(x, torch.full((5,), -5), inv_freq, pairs))
        assert torch.equal(once[..., 8:], x[..., 8:])
