"""Frequencies against golden numbers, transformers' own functions, and what must hold for any method."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from e2llm.positions import oracle
from e2llm.positions.frequencies import METHODS, Frequencies, frequencies
from e2llm.positions.rope import Rope

GOLDENS = json.loads((Path(__file__).parents[1] / "goldens" / "frequencies.json").read_text())["cases"]
SCALES = [1.0, 1.5, 2.0, 2.7, 3.0, 4.0, 5.0, 16.0, 20.0, 33.3]
MODELS = [(1e4, 128, 4096), (1e4, 16, 64), (1e5, 64, 8192), (5e5, 128, 8192), (1e6, 64, 32768), (1e4, 80, 2048)]
UNSCALED = ["none", "linear", "ntk", "dynamic_ntk", "yarn"]


def make_rope(base: float, dim: int, window: int, **changes: object) -> Rope:
    """A plain model's rope: its frequencies are transformers' own expression for `default`."""
    inv_freq = 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float) / dim))
    rope = Rope(rotary_dim=dim, base=base, native_window=window, inv_freq=tuple(inv_freq.tolist()))
    return dataclasses.replace(rope, **changes)


def theirs(base: float, dim: int, window: int, rope_type: str, seq_len: int | None = None, **extra: object):
    """transformers' static scaling of the same model."""
    config = LlamaConfig(
        hidden_size=dim * 2,
        num_attention_heads=2,
        max_position_embeddings=window,
        rope_parameters={"rope_theta": base, "rope_type": rope_type, **extra},
    )
    return ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"), seq_len=seq_len)


def assert_same(ours: Frequencies, expected: tuple[torch.Tensor, float]) -> None:
    assert ours.inv_freq.dtype == torch.float32
    assert torch.equal(ours.inv_freq, expected[0])
    assert ours.attention_scale == expected[1]


@pytest.mark.parametrize("case", GOLDENS, ids=lambda c: f"{c['method']}-{c['base']:g}-{c['rotary_dim']}-{c['scale']:g}")
def test_golden(case: dict) -> None:
    base, dim, window, scale = case["base"], case["rotary_dim"], case["native_window"], case["scale"]
    exact = {
        "linear": lambda: oracle.linear_inv_freq(base, dim, scale),
        "ntk": lambda: oracle.ntk_inv_freq(base, dim, scale),
        "dynamic_ntk": lambda: oracle.ntk_inv_freq(base, dim, scale),
        "yarn": lambda: oracle.yarn_inv_freq(base, dim, scale, window),
    }[case["method"]]()
    np.testing.assert_allclose(exact, case["inv_freq"], rtol=1e-12, atol=0)
    ours = frequencies(make_rope(base, dim, window), case["method"], scale)
    np.testing.assert_allclose(ours.inv_freq.double().numpy(), case["inv_freq"], rtol=1e-6, atol=0)
    assert ours.attention_scale == pytest.approx(case["attention_scale"], rel=1e-15)
    if case["method"] == "yarn":
        assert oracle.yarn_attention_scale(scale) == pytest.approx(case["attention_scale"], rel=1e-15)


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_equal_to_transformers(model: tuple[float, int, int]) -> None:
    window = model[2]
    rope = make_rope(*model)
    for scale in SCALES:
        assert_same(frequencies(rope, "linear", scale), theirs(*model, "linear", factor=scale))
        if scale == 1.0:  # theirs blends theta with itself and rounds; ours is the model's own (next test but one)
            continue
        yarn = theirs(*model, "yarn", factor=scale, original_max_position_embeddings=window)
        assert_same(frequencies(rope, "yarn", scale), yarn)
    for length in (window, window + 1, 3 * window, 2 * window + window // 3, 20 * window):
        dynamic = theirs(*model, "dynamic", seq_len=length, factor=1.0)
        assert_same(frequencies(rope, "ntk", length / window), dynamic)


def test_longrope_equals_transformers() -> None:
    short, long = [1.0] * 8, [1.0, 1.1, 1.4, 2.0, 3.5, 5.0, 7.7, 8.0]
    extra = {"short_factor": short, "long_factor": long, "original_max_position_embeddings": 64, "factor": 8.0}
    config = LlamaConfig(
        hidden_size=32,
        num_attention_heads=2,
        max_position_embeddings=512,
        rope_parameters={"rope_theta": 1e4, "rope_type": "longrope", **extra},
    )
    function = ROPE_INIT_FUNCTIONS["longrope"]
    attention = math.sqrt(1 + math.log(8) / math.log(64))
    rope = make_rope(1e4, 16, 64, rope_type="longrope", long_factors=tuple(long), max_scale=8.0)
    rope = dataclasses.replace(rope, attention_scale=attention)
    assert_same(frequencies(rope, "longrope", 1.0), function(config, "cpu", seq_len=64))
    for scale in (1.01, 2.0, 8.0):
        assert_same(frequencies(rope, "longrope", scale), function(config, "cpu", seq_len=65))
    with pytest.raises(ValueError, match=r"scale = 8\.5.*reach scale 8"):
        frequencies(rope, "longrope", 8.5)


@pytest.mark.parametrize("method", UNSCALED)
def test_scale_one_is_the_model(method: str) -> None:
    # Frequencies that no formula gives exactly: they must come back untouched, not be computed again.
    plain = make_rope(1e4, 64, 4096)
    nudged = tuple(float(np.nextafter(np.float32(f), np.float32(0))) for f in plain.inv_freq)
    rope = dataclasses.replace(plain, inv_freq=nudged, attention_scale=1.25)
    assert_same(frequencies(rope, method, 1.0), (torch.tensor(nudged), 1.25))


@pytest.mark.parametrize("method", UNSCALED)
@pytest.mark.parametrize("model", MODELS, ids=str)
def test_frequencies_never_rise_with_scale(method: str, model: tuple[float, int, int]) -> None:
    tables = torch.stack([frequencies(make_rope(*model), method, scale).inv_freq for scale in sorted(SCALES)])
    # One part in 10^6: float32 rounding of a frequency that a method keeps.
    assert bool((tables[1:] <= tables[:-1] * (1 + 1e-6)).all())
    assert bool((tables[:, 1:] < tables[:, :-1]).all()), "channels stay in order"
    if method != "none":
        assert tables[-1, -1] < tables[0, -1] / 30, "the slowest channel is stretched by the whole scale"


def test_none_ignores_the_scale() -> None:
    rope = make_rope(1e4, 64, 4096)
    assert torch.equal(frequencies(rope, "none", 7.0).inv_freq, torch.tensor(rope.inv_freq))


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_yarn_keeps_fast_channels_and_divides_slow_ones(model: tuple[float, int, int]) -> None:
    """YaRN Eqs. 17-18's ends: more than 32 turns in the native window keep theta, fewer than 1 get theta / g."""
    base, dim, window = model
    theta = base ** (-np.arange(0, dim, 2) / dim)
    turns = window * theta / (2 * np.pi)
    for scale in (2.7, 16.0):
        for found in (
            oracle.yarn_inv_freq(base, dim, scale, window),
            frequencies(make_rope(*model), "yarn", scale).inv_freq.double().numpy(),
        ):
            np.testing.assert_allclose(found[turns > 32], theta[turns > 32], rtol=1e-6)
            np.testing.assert_allclose(found[turns < 1], theta[turns < 1] / scale, rtol=1e-6)
            between = (turns <= 32) & (turns >= 1)
            assert (found[between] <= theta[between] * (1 + 1e-6)).all()
            assert (found[between] >= theta[between] / scale * (1 - 1e-6)).all()


def test_linear_starts_from_the_models_own_frequencies() -> None:
    """llama3, linear, yarn bases compose: their frequencies divided once more, their attention scale kept."""
    for rope_type in ("llama3", "linear", "yarn", "dynamic"):
        plain = make_rope(1e4, 16, 64)
        own = tuple(torch.tensor([f / (1 + i) for i, f in enumerate(plain.inv_freq)]).tolist())
        rope = dataclasses.replace(plain, rope_type=rope_type, inv_freq=own, attention_scale=1.3)
        assert_same(frequencies(rope, "linear", 3.0), (torch.tensor(own) / 3.0, 1.3))


@pytest.mark.parametrize("method", ["ntk", "yarn"])
@pytest.mark.parametrize("rope_type", ["llama3", "linear", "yarn", "longrope", "proportional"])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_never_scales_twice(method: str, rope_type: str, scale: float) -> None:
    rope = make_rope(1e4, 16, 64, rope_type=rope_type)
    with pytest.raises(ValueError, match=f"method = '{method}'.*'{rope_type}'.*already scales.*'linear'"):
        frequencies(rope, method, scale)


@pytest.mark.parametrize("method", ["ntk", "yarn"])
def test_frequencies_that_the_base_does_not_give_are_refused(method: str) -> None:
    plain = make_rope(1e4, 16, 64)
    rope = dataclasses.replace(plain, inv_freq=tuple(f / 2 for f in plain.inv_freq))
    with pytest.raises(ValueError, match=f"method = '{method}'.*base 10000"):
        frequencies(rope, method, 2.0)


def test_linear_on_longrope_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'linear' on a LongRoPE base.*'longrope'"):
        frequencies(make_rope(1e4, 16, 64, rope_type="longrope"), "linear", 2.0)


@pytest.mark.parametrize("scale", [0.999, 0.0, -2.0, math.nan, math.inf])
@pytest.mark.parametrize("method", UNSCALED)
def test_a_scale_is_at_least_one(method: str, scale: float) -> None:
    with pytest.raises(ValueError, match=r"scale = .*at least 1"):
        frequencies(make_rope(1e4, 16, 64), method, scale)


def test_other_errors() -> None:
    with pytest.raises(ValueError, match="method = 'pi': choose one of none, linear, ntk, dynamic_ntk, yarn, longrope"):
        frequencies(make_rope(1e4, 16, 64), "pi", 2.0)
    with pytest.raises(ValueError, match="no long_factor"):
        frequencies(make_rope(1e4, 16, 64), "longrope", 2.0)
    with pytest.raises(ValueError, match="rotary_dim = 2"):
        frequencies(make_rope(1e4, 2, 64), "ntk", 2.0)
    with pytest.raises(ValueError, match="native_window = 0"):
        make_rope(1e4, 16, 0)
    with pytest.raises(ValueError, match=r"rotary_dim = 18: .*frequencies, 8"):
        make_rope(1e4, 16, 64, rotary_dim=18)
    for rope_type in ("dynamic", "longrope"):
        with pytest.raises(ValueError, match=f"'self_extend' on a base whose rope_type is '{rope_type}'"):
            frequencies(make_rope(1e4, 16, 64, rope_type=rope_type), "self_extend", 2.0)
    assert set(METHODS) == {*UNSCALED, "longrope", "self_extend"}


@pytest.mark.parametrize("method", UNSCALED)
def test_scores_depend_on_position_differences_only(method: str) -> None:
    found = frequencies(make_rope(1e4, 64, 128), method, 5.0)
    inv_freq = found.inv_freq.double().numpy()
    rng = np.random.default_rng(0)
    query, key = rng.normal(size=(2, 64))

    def score(m: float, n: float) -> float:
        tables = [oracle.rotation_tables(inv_freq, np.array(at), found.attention_scale) for at in (m, n)]
        return float(oracle.rotate_half_split(query, *tables[0]) @ oracle.rotate_half_split(key, *tables[1]))

    for m, n in ((7, 3), (600, 2), (5, 5)):
        for shift in (1, 17, 10_000):
            assert score(m + shift, n + shift) == pytest.approx(score(m, n), rel=1e-9)
    assert abs(score(7, 3) - score(7, 2)) > 1e-3, "and they do depend on those"


def test_oracle_rotation_is_complex_multiplication() -> None:
    """RoFormer Eq. 13: channel pair j as a complex number, times exp(i m theta_j)."""
    theta = oracle.plain_inv_freq(1e4, 16)
    x = np.random.default_rng(1).normal(size=16)
    turned = (x[:8] + 1j * x[8:]) * np.exp(1j * 12_345.0 * theta) * 1.5
    ours = oracle.rotate_half_split(x, *oracle.rotation_tables(theta, np.array(12_345), 1.5))
    np.testing.assert_allclose(ours, np.concatenate([turned.real, turned.imag]), rtol=1e-12)
