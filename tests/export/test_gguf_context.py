"""What a llama.cpp context is told for a scale, against the frequencies that training and serving use."""

from __future__ import annotations

import math

import pytest
import torch

from e2llm.export.gguf_context import ContextRope, context_frequencies, context_rope
from e2llm.positions.frequencies import frequencies
from e2llm.positions.rope import Rope


def rope(divisors: list[float] | None = None, **fields: float) -> Rope:
    inv_freq = 1.0 / 10000.0 ** (torch.arange(0, 32, 2, dtype=torch.float64) / 32)
    if divisors:
        inv_freq = inv_freq / torch.tensor(divisors)
    kind = "default" if divisors is None else "llama3"
    values = tuple(inv_freq.float().tolist())
    return Rope(rotary_dim=32, base=10000.0, native_window=2048, inv_freq=values, rope_type=kind, **fields)


@pytest.mark.parametrize("method", ["linear", "ntk", "yarn"])
@pytest.mark.parametrize("scale", [1.5, 4.0, 16.0])
@pytest.mark.parametrize("slope", [None, 0.0, 0.04, 0.1])
def test_frequencies_are_ours(method: str, scale: float, slope: float | None) -> None:
    found = context_frequencies(rope(), context_rope(rope(), method, scale, slope))
    expected = frequencies(rope(), method, scale, slope)
    assert torch.allclose(found.inv_freq.float(), expected.inv_freq, rtol=1e-5, atol=0)
    assert math.isclose(found.attention_scale, expected.attention_scale, rel_tol=1e-6)


def test_the_words_of_llamacpp() -> None:
    assert context_rope(rope(), "linear", 4.0, None) == ContextRope(scaling="linear", freq_scale=0.25)
    assert context_rope(rope(), "yarn", 4.0, None) == ContextRope(
        scaling="yarn", freq_scale=0.25, original_window=2048
    ), "its own multiplier is YaRN's: the file needs no other"
    told = context_rope(rope(), "yarn", 4.0, 0.04)
    assert told.model_attn_factor == pytest.approx((1 + 0.04 * math.log(4)) / (1 + 0.1 * math.log(4)))
    assert context_rope(rope(), "linear", 4.0, 0.05).attn_factor == pytest.approx(1 + 0.05 * math.log(4))
    assert context_rope(rope(), "yarn", 1.0, 0.04) == context_rope(rope(), "none", 4.0, None) == ContextRope()


def test_linear_composes_with_a_base_that_scales() -> None:
    base = rope([1.0] * 8 + [4.0] * 8, attention_scale=1.2)
    found = context_frequencies(base, context_rope(base, "linear", 4.0, 0.05))
    expected = frequencies(base, "linear", 4.0, 0.05)
    assert torch.allclose(found.inv_freq.float(), expected.inv_freq, rtol=1e-5, atol=0)
    assert math.isclose(found.attention_scale, expected.attention_scale, rel_tol=1e-6)


def test_groups_leave_the_file_s_own_frequencies() -> None:
    base = rope([1.0] * 8 + [4.0] * 8)
    assert context_rope(base, "self_extend", 4.0, None) == ContextRope()
    with pytest.raises(ValueError, match=r"attention scale of 1\.2: llama\.cpp multiplies keys by it each time"):
        context_rope(rope(attention_scale=1.2), "self_extend", 4.0, None)
    with pytest.raises(ValueError, match="each time that they are moved"):
        context_rope(rope(), "self_extend", 4.0, 0.04)


def test_what_cannot_be_told() -> None:
    with pytest.raises(ValueError, match=r"longrope.*--engine e2llm"):
        context_rope(rope(), "longrope", 4.0, None)
