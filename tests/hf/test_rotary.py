"""Reading a model's rotary module: numbers, layouts, refusals."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from architectures import WINDOW, tiny_config, tiny_model, token_ids, with_rope
from torch import nn

from e2llm.hf import install
from e2llm.hf.rotary import LAYOUTS, detect_layout, find_rotary_owner, is_local, layer_types, read_rope
from e2llm.positions import oracle

PLAIN = {"rope_type": "default"}


def scaled_llama(**rope: Any) -> nn.Module:
    return tiny_model("llama", rope_parameters=with_rope(tiny_config("llama"), **rope).rope_parameters)


def rope_of(model: nn.Module, layer_type: str | None = None, **arguments: Any) -> Any:
    return read_rope(find_rotary_owner(model).rotary_emb, model.config, layer_type, **arguments)


@pytest.mark.parametrize(
    ("name", "overrides", "rotary_dim", "base"),
    [
        ("llama", {}, 16, 1e4),
        ("llama", {"rope_parameters": {**PLAIN, "rope_theta": 5e5}}, 16, 5e5),
        ("qwen3", {"head_dim": 32}, 32, 1e4),
        ("phi3", {"rope_parameters": {**PLAIN, "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, 8, 1e4),
        ("gpt_neox", {}, 4, 1e4),
        ("deepseek_v3", {"qk_rope_head_dim": 8, "head_dim": 8}, 8, 1e4),
    ],
)
def test_reads_the_models_own_numbers(name: str, overrides: dict, rotary_dim: int, base: float) -> None:
    rope = rope_of(tiny_model(name, **overrides))
    assert (rope.rotary_dim, rope.base, rope.native_window, rope.rope_type) == (rotary_dim, base, WINDOW, "default")
    assert rope.attention_scale == 1.0 and rope.long_factors is None and rope.max_scale is None
    np.testing.assert_allclose(rope.inv_freq, oracle.plain_inv_freq(base, rotary_dim), rtol=1e-6)
    assert rope_of(tiny_model(name, **overrides), native_window=48).native_window == 48


def test_reads_each_layer_type() -> None:
    model = tiny_model("gemma3_text")
    rotary = find_rotary_owner(model).rotary_emb
    assert sorted(layer_types(rotary)) == ["full_attention", "sliding_attention"]
    assert rope_of(model, "full_attention").base == 1e6 and rope_of(model, "sliding_attention").base == 1e4
    np.testing.assert_allclose(rope_of(model, "full_attention").inv_freq, oracle.plain_inv_freq(1e6, 16), rtol=1e-6)
    assert is_local("sliding_attention") and not is_local("full_attention") and not is_local(None)


def test_reads_scaled_bases() -> None:
    llama3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope = rope_of(scaled_llama(**llama3, original_max_position_embeddings=32))
    assert rope.rope_type == "llama3" and rope.native_window == WINDOW
    assert rope.inv_freq[0] == 1.0 and rope.inv_freq[-1] == pytest.approx(oracle.plain_inv_freq(1e4, 16)[-1] / 4)
    yarn = rope_of(scaled_llama(rope_type="yarn", factor=4.0, original_max_position_embeddings=16))
    assert yarn.attention_scale == pytest.approx(0.1 * math.log(4) + 1) and yarn.native_window == WINDOW
    long = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    rope = rope_of(scaled_llama(**long, original_max_position_embeddings=16))
    assert (rope.native_window, rope.max_scale, rope.long_factors) == (16, 4.0, (2.0,) * 8)
    np.testing.assert_allclose(rope.inv_freq, oracle.plain_inv_freq(1e4, 16), rtol=1e-6)
    assert rope.attention_scale == pytest.approx(math.sqrt(1 + math.log(4) / math.log(16)))


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_a_table_changed_by_a_long_forward_is_not_the_models(rope_type: str) -> None:
    extra = {"short_factor": [1.0] * 8, "long_factor": [3.0] * 8, "original_max_position_embeddings": WINDOW}
    model = scaled_llama(rope_type=rope_type, factor=2.0, **(extra if rope_type == "longrope" else {}))
    before = rope_of(model)
    with torch.no_grad():
        model(token_ids(1, 2 * WINDOW))
    assert tuple(model.model.rotary_emb.inv_freq.tolist()) != before.inv_freq, "the forward did change the buffer"
    assert rope_of(model) == before


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        *[(name, "half_split") for name in ("llama", "gemma3_text", "phi3", "gpt_neox", "deepseek_v3", "olmo2")],
        *[("cohere", "interleaved"), ("gpt_oss", "compact"), ("llama4_text", "complex"), ("deepseek_v2", "complex")],
    ],
)
def test_layouts(name: str, layout: str) -> None:
    model = tiny_model(name)
    rotary = find_rotary_owner(model).rotary_emb
    layer_type = "full_attention" if name == "gemma3_text" else None
    found, takes_dtype = detect_layout(rotary, rope_of(model, layer_type), layer_type)
    assert found == layout
    x = torch.zeros(1, 5, 64, dtype=torch.bfloat16)
    own = rotary(x, torch.arange(5)[None], *([layer_type] if layer_type else []))
    own = own[0] if isinstance(own, tuple) else own
    assert takes_dtype == (own.dtype == torch.bfloat16)


@pytest.mark.parametrize("original", [2, 7, 16, 30])
@pytest.mark.parametrize("native_window", [None, WINDOW])
def test_a_layout_is_asked_for_inside_a_short_original_window(original: int, native_window: int | None) -> None:
    """Beyond its original window a longrope module answers with other frequencies, whatever window we were given."""
    long = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0 + j for j in range(8)]}
    model = scaled_llama(**long, original_max_position_embeddings=original)
    rotary = model.model.rotary_emb
    rope = read_rope(rotary, model.config, native_window=native_window)
    assert detect_layout(rotary, rope, None) == ("half_split", True)


def test_layouts_differ_from_each_other() -> None:
    angles = torch.rand(2, 5, 4, generator=torch.Generator().manual_seed(0))
    half, pairs = LAYOUTS["half_split"](angles, 1.5)[0], LAYOUTS["interleaved"](angles, 1.5)[0]
    assert torch.equal(half[..., 1], half[..., 5]) and torch.equal(pairs[..., 2], pairs[..., 3])
    turned = LAYOUTS["complex"](angles, 1.5)
    compact = LAYOUTS["compact"](angles, 1.5)
    torch.testing.assert_close(turned, torch.complex(*compact))
    torch.testing.assert_close(half[..., :4], compact[0])


class Sideways(nn.Module):
    """A rotary module with sin before cos."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inv_freq = inner.inv_freq

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = (position_ids[..., None].float() * self.inv_freq).repeat(1, 1, 2)
        return angles.sin().to(x.dtype), angles.cos().to(x.dtype)


def test_unknown_layout_is_refused() -> None:
    model = tiny_model("llama")
    model.model.rotary_emb = strange = Sideways(model.model.rotary_emb)
    with pytest.raises(ValueError, match=r"Sideways lays out cos and sin.*half_split, interleaved.*supported"):
        install(model)
    assert model.model.rotary_emb is strange


def test_a_module_without_frequencies_is_refused() -> None:
    model = tiny_model("llama")
    model.model.rotary_emb = nn.Identity()
    with pytest.raises(ValueError, match=r"'llama' has no rotary embedding.*holds an inv_freq.*supported"):
        install(model)


def test_a_second_rotary_module_is_refused() -> None:
    model = tiny_model("llama")
    model.model.layers[0].rotary = type(model.model.rotary_emb)(model.config)
    with pytest.raises(ValueError, match=r"'llama' has further rotary modules \(model\.layers\.0\.rotary\).*supported"):
        install(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cast_models_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"inv_freq is {dtype}: angles need float32.*from_pretrained"):
        install(tiny_model("llama").to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_made_in_low_precision_are_read_in_float32(dtype: torch.dtype) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(tiny_config("llama"), dtype=dtype).eval()
    ids = token_ids(1, 9)
    with torch.no_grad():
        before = model(ids).logits
        extension = install(model, method="linear")
        assert extension.rope == rope_of(tiny_model("llama"))
        assert torch.equal(model(ids).logits, before) and before.dtype == dtype
        extension.set_scale(2.0)
        scaled = model(ids).logits
        assert scaled.dtype == dtype and torch.isfinite(scaled).all() and not torch.equal(scaled, before)
    cos, _ = model.model.rotary_emb(torch.zeros(1, 9, 64, dtype=dtype), torch.arange(9)[None])
    assert cos.dtype == dtype


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, 0.0])
def test_frequencies_never_initialised_are_refused(value: float) -> None:
    model = tiny_model("llama")
    model.model.rotary_emb.inv_freq.fill_(value)
    model.model.rotary_emb.original_inv_freq.fill_(value)
    with pytest.raises(ValueError, match=r"holds no frequencies .*not initialised"):
        install(model)


def test_models_on_the_meta_device_are_refused() -> None:
    with torch.device("meta"):
        model = tiny_model("llama")
    with pytest.raises(ValueError, match="meta device: load the weights before extending"):
        install(model)


def test_a_config_without_a_window_asks_for_it() -> None:
    model = tiny_model("llama")
    model.config.__dict__["max_position_embeddings"] = None
    with pytest.raises(ValueError, match=r"'llama'.*no max_position_embeddings; pass native_window"):
        install(model)
    assert install(model, native_window=48).native_window == 48
