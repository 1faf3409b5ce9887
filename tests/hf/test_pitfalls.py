"""The traps that gave others wrong results with a falling loss and no warning; one or more tests for each."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from architectures import WINDOW, statically_scaled, tiny_config, tiny_model, token_ids, with_rope
from torch import nn

from e2llm.hf import get_extension, install
from e2llm.hf.cache import cache_argument
from e2llm.positions import oracle
from e2llm.positions.placement import Placement, PlacementConfig, PositionSampler
from e2llm.positions.scales import ScalesConfig

TOKENS = 32


def make_sampler(kind: str, **settings: int) -> PositionSampler:
    return PositionSampler(
        native_window=WINDOW,
        training_window=TOKENS,
        scales=ScalesConfig(distribution="fixed", max_scale=8),
        placement=PlacementConfig(kind=kind, **settings),
    )


@torch.no_grad()
def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, use_cache=False).logits


def last_token_sees_the_first(model: nn.Module, batch: int) -> None:
    ids = token_ids(batch, TOKENS)
    other = ids.clone()
    other[:, 0] += 1
    extension = get_extension(model)
    moved = []
    for tokens in (ids, other):
        extension.expect(range(batch))
        moved.append(logits(model, tokens)[:, -1])
    assert bool(((moved[0] - moved[1]).abs().amax(-1) > 1e-4).all()), "the first token is cut off from the last"


@pytest.mark.usefixtures("plain_flex")
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention"])
@pytest.mark.parametrize("kind", ["paper", "jumps", "randpos"])
def test_1_jumps_in_position_do_not_cut_the_window(kind: str, attention: str, batch: int) -> None:
    model = tiny_model("llama", attn_implementation=attention).train()
    install(model, method="yarn").sampler = make_sampler(kind)
    last_token_sees_the_first(model, batch)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning")  # transformers' call
def test_1_with_flex_attention_compiled() -> None:
    model = tiny_model("llama", attn_implementation="flex_attention").train()
    install(model, method="yarn").sampler = make_sampler("jumps")
    last_token_sees_the_first(model, 2)


def test_1_the_trap_is_real() -> None:
    """Given the same positions as `position_ids`, transformers does cut: the test above can fail."""
    model, ids = tiny_model("llama"), token_ids(1, TOKENS)
    positions = torch.from_numpy(make_sampler("paper").draw(0).positions)[None]
    assert positions[0, 4] > 4
    other = ids.clone()
    other[:, 0] += 1
    with torch.no_grad():
        found = [model(i, position_ids=positions, use_cache=False).logits[:, -1] for i in (ids, other)]
    assert torch.equal(*found)


@pytest.mark.parametrize("method", ["linear", "yarn"])
def test_2_shifting_every_token_does_nothing(method: str) -> None:
    """RoPE is relative: an offset means something only against the leading tokens that stay."""
    model, ids = tiny_model("llama"), token_ids(1, TOKENS)
    extension = install(model, method=method)
    plain = np.arange(TOKENS)
    shifted, anchored = plain + 300, plain + 300 * (plain >= 4)
    found = []
    for positions in (plain, shifted, anchored):
        extension.place([Placement(8.0, positions)])
        found.append(logits(model, ids))
    # float32 angles: 332 radians carry an error of 2e-5
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=2e-3)
    assert (found[2] - found[0]).abs().max() > 0.05


def test_2_without_leading_tokens_the_papers_offset_is_void() -> None:
    model, ids = tiny_model("llama").train(), token_ids(2, TOKENS)
    extension = install(model, method="linear")
    extension.sampler = make_sampler("none")
    reference = logits(model, ids)
    for leading, same in ((0, True), (4, False)):
        extension.sampler = make_sampler("paper", leading_tokens=leading)
        moved = (logits(model, ids) - reference).abs().max()
        assert bool(moved < 2e-3) == same


@pytest.mark.parametrize("method", ["linear", "yarn"])
def test_3_angles_are_float32_under_autocast(method: str) -> None:
    """bf16 positions near 100,000 are 512 apart; cos and sin must come from float32 angles, then be cast."""
    positions = np.array([99_999, 100_000, 100_001])
    model = tiny_model("llama")
    extension = install(model, method=method, native_window=8192)
    extension.set_scale(16.0)
    exact = {
        "linear": oracle.linear_inv_freq(1e4, 16, 16.0),
        "yarn": oracle.yarn_inv_freq(1e4, 16, 16.0, 8192),
    }[method]
    cos, sin = oracle.rotation_tables(exact, positions, extension._frequencies(None, 16.0).attention_scale)
    for dtype, tolerance in ((torch.float32, 0.02), (torch.bfloat16, 0.03)):
        x = torch.zeros(1, 3, 64, dtype=dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = model.model.rotary_emb(x, torch.from_numpy(positions)[None])
        for ours, expected in zip(found, (cos, sin), strict=True):
            assert ours.dtype == dtype
            # float32: half a unit in the last place of an angle of 1e5 is 0.004
            np.testing.assert_allclose(ours[0, :, :8].float().numpy(), expected, atol=tolerance)
        assert not torch.equal(found[0][0, 0], found[0][0, 1]), "neighbours are told apart"


def test_3_placed_positions_keep_float32_too() -> None:
    model = tiny_model("llama")
    extension = install(model, method="linear")
    positions = np.array([0, 1, 2, 3, 90_001, 90_002])
    extension.place([Placement(16.0, positions)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cos, _ = model.model.rotary_emb(torch.zeros(1, 6, 64), torch.arange(6)[None])
    exact, _ = oracle.rotation_tables(oracle.linear_inv_freq(1e4, 16, 16.0), positions)
    np.testing.assert_allclose(cos[0, :, :8].numpy(), exact, atol=1e-3)


def test_5_the_draw_arrives() -> None:
    """Another sample index gives other logits for the same tokens, the same index the same ones, row by row."""
    model, ids = tiny_model("llama").train(), token_ids(1, TOKENS).repeat(3, 1)
    extension = install(model)
    extension.sampler = make_sampler("jumps")
    extension.expect([11, 12, 11])
    rows = logits(model, ids)
    torch.testing.assert_close(rows[0], rows[2], rtol=0, atol=1e-5)
    assert (rows[0] - rows[1]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="2 sample indices were named for a batch of 3 samples"):
        extension.expect([1, 2])
        logits(model, ids)


def test_6_a_config_edited_after_loading_changes_nothing_but_the_handle_does() -> None:
    model, ids = tiny_model("llama"), token_ids(1, 12)
    extension = install(model, method="linear")
    before = logits(model, ids)
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_type": "linear", "factor": 8.0}
    assert torch.equal(logits(model, ids), before)
    extension.set_scale(8.0)
    assert not torch.equal(logits(model, ids), before)


LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0}
LINEAR = {"rope_type": "linear", "factor": 2.0}


def scaled_base(rope: dict) -> nn.Module:
    original = {} if rope["rope_type"] == "linear" else {"original_max_position_embeddings": 32}
    config = with_rope(tiny_config("llama"), **rope, **original)
    return tiny_model("llama", rope_parameters=config.rope_parameters)


@pytest.mark.parametrize("rope", [LLAMA3, YARN, LINEAR], ids=lambda r: r["rope_type"])
def test_7_and_16_linear_composes_with_a_base_that_scales(rope: dict) -> None:
    """Every position divided by g, on top of the base's own scaling; its attention scale kept once."""
    model, ids = scaled_base(rope), token_ids(2, 48)
    own = model.model.rotary_emb
    frequencies, attention = own.inv_freq.clone(), own.attention_scaling
    assert attention == (pytest.approx(0.1 * math.log(4) + 1) if rope["rope_type"] == "yarn" else 1.0)
    before = logits(model, ids)
    extension = install(model, method="linear")
    assert torch.equal(logits(model, ids), before)
    extension.set_scale(3.0)
    expected = scaled_base(rope)
    expected.model.rotary_emb.inv_freq = frequencies / 3.0
    assert torch.equal(logits(model, ids), logits(expected, ids))
    if rope["rope_type"] == "linear":
        once = statically_scaled(tiny_model("llama"), rope_type="linear", factor=6.0)
        torch.testing.assert_close(logits(model, ids), logits(once, ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["yarn", "ntk"])
@pytest.mark.parametrize("rope", [LLAMA3, YARN, LINEAR], ids=lambda r: r["rope_type"])
def test_7_and_16_other_methods_refuse_it(rope: dict, method: str) -> None:
    model = scaled_base(rope)
    own = model.model.rotary_emb
    message = f"method = '{method}'.*'{rope['rope_type']}': the base already scales.*'linear'"
    with pytest.raises(ValueError, match=message):
        install(model, method=method)
    assert model.model.rotary_emb is own


def test_7_extending_again_starts_from_the_base(tmp_path) -> None:
    """A scale that is set is no part of the checkpoint: extending what was saved at scale 4 does not square it."""
    from transformers import AutoModelForCausalLM

    model, ids = tiny_model("llama"), token_ids(1, 20)
    install(model, method="linear").set_scale(4.0)
    at_four = logits(model, ids)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    install(again, method="linear").set_scale(4.0)
    assert torch.equal(logits(again, ids), at_four)


def test_10_a_scale_is_fixed_while_keys_are_cached() -> None:
    """Token by token with a cache equals the whole window at once, because the scale did not change in between."""
    model, ids = tiny_model("llama"), token_ids(1, 40)
    install(model, method="yarn").set_scale(2.5)
    whole = logits(model, ids)
    with torch.no_grad():
        step = model(ids[:, :30], use_cache=True)
        pieces = [step.logits]
        for at in range(30, 40):
            step = model(ids[:, at : at + 1], **cache_argument(model, step.past_key_values))
            pieces.append(step.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-5)


def test_12_a_short_request_is_served_at_scale_one() -> None:
    from e2llm.positions.choose import choose_scale

    model, ids = tiny_model("llama"), token_ids(1, 20)
    before = logits(model, ids)
    extension = install(model)
    extension.set_scale(choose_scale(20, WINDOW, max_scale=16).scale)
    assert torch.equal(logits(model, ids), before)


def test_13_a_resumed_run_draws_what_an_unbroken_one_would() -> None:
    ids = token_ids(2, TOKENS)
    steps = [[0, 1], [2, 3], [4, 5], [6, 7]]

    def run(batches: list[list[int]]) -> list[torch.Tensor]:
        model = tiny_model("llama").train()
        extension = install(model)
        extension.sampler = make_sampler("jumps")
        found = []
        for indices in batches:
            extension.expect(indices)
            found.append(logits(model, ids))
        return found

    unbroken, resumed = run(steps), run(steps[2:])
    assert all(torch.equal(a, b) for a, b in zip(unbroken[2:], resumed, strict=True))
    assert not torch.equal(unbroken[0], unbroken[1])
