"""Turned keys against the keys that the model itself writes at the other scale; layer 0 knows no approximation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from architectures import tiny_model, token_ids
from interpreted import needs_interpreter, run_interpreted, starts_interpreter

from e2llm.hf import install
from e2llm.hf.packed import KeyValuePages, PackedStep, Piece
from e2llm.hf.packed_model import PackedModel
from e2llm.hf.rerotate import Rerotation, find_pairings

TOKENS, PAGE = 120, 8
FAMILIES = ["llama", "gpt_neox", "cohere", "gemma3_text", "gpt_oss", "deepseek_v3", "deepseek_v2", "glm", "qwen3"]


def pages_of(packed: PackedModel, scale: float, first: int, store: KeyValuePages) -> np.ndarray:
    """A prompt read at `scale` into pages of `store` from page `first` on, in no order."""
    table = first + np.random.default_rng(first).permutation(TOKENS // PAGE)
    ids = token_ids(1, TOKENS, seed=5)[0].numpy()
    step = PackedStep(store, [Piece(table, 0, TOKENS)])
    with torch.no_grad():
        packed.logits(step, ids, (scale,), np.zeros(TOKENS, dtype=np.int64), [])
    return table


def keys(store: KeyValuePages, layer: int, table: np.ndarray) -> torch.Tensor:
    return store.layers[layer][torch.from_numpy(table)].flatten(0, 1)[..., : store.shapes[layer].key_dim]


def turned_and_read_again(model: Any, method: str, old: float, new: float, kernels: bool = False) -> tuple[Any, ...]:
    packed = PackedModel(model, install(model, method=method), kernels=kernels)
    count = TOKENS // PAGE
    store = KeyValuePages(packed.shapes, 3 * count, PAGE, packed.device)
    before, exact = (pages_of(packed, g, 1 + place * count, store) for place, g in enumerate((old, new)))
    turned = 1 + 2 * count + np.random.default_rng(9).permutation(count)
    kept = {layer: keys(store, layer, before).clone() for layer in store.layers}
    Rerotation(packed, store).turn(before, turned, 0, old, new)
    for layer, key in kept.items():
        assert torch.equal(keys(store, layer, before), key), "the old pages stay"
    packed.restore()
    return store, before, exact, turned


def check_first_layer(model_type: str, method: str, old: float, new: float, kernels: bool = False) -> None:
    options = {"layer_types": ["full_attention"] * 2} if model_type == "gemma3_text" else {}
    store, before, exact, turned = turned_and_read_again(tiny_model(model_type, **options), method, old, new, kernels)
    expected = keys(store, 0, exact)
    torch.testing.assert_close(keys(store, 0, turned), expected, rtol=1e-4, atol=1e-4)
    assert (keys(store, 0, before) - expected).norm() > 0.05 * expected.norm(), "without turning they are wrong"
    first, second = (store.layers[0][torch.from_numpy(table)] for table in (turned, exact))
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_first_layer_is_exact(model_type: str) -> None:
    check_first_layer(model_type, "linear", 1.0, 2.0)


@pytest.mark.parametrize(("old", "new"), [(1.0, 4.0), (2.0, 8.0), (4.0, 1.0), (3.0, 3.5)])
@pytest.mark.parametrize("method", ["linear", "yarn"])
def test_any_two_scales(method: str, old: float, new: float) -> None:
    """With yarn the attention scale changes as well."""
    check_first_layer("llama", method, old, new)


def test_deeper_layers_come_closer_than_doing_nothing() -> None:
    store, before, exact, turned = turned_and_read_again(tiny_model("llama"), "yarn", 1.0, 2.0)
    expected = keys(store, 1, exact)
    near, far = ((keys(store, 1, table) - expected).norm() for table in (turned, before))
    assert 0 < near < far / 3


def test_layers_that_no_scale_touches_are_copied() -> None:
    model = tiny_model("gemma3_text")  # one local layer, one full one
    packed = PackedModel(model, install(model, method="linear"))
    pairings = find_pairings(packed)
    assert pairings[0] is None and pairings[1] is not None and pairings[1].layer_type == "full_attention"
    model = tiny_model("smollm3", no_rope_layers=[0, 1])
    packed = PackedModel(model, install(model, method="linear"))
    pairings = find_pairings(packed)
    assert pairings[0] is None and pairings[1] is not None


def test_a_model_that_does_more_to_its_keys_is_refused() -> None:
    model: Any = tiny_model("hunyuan_v1_dense")  # a norm with weights behind the rotation
    for layer in model.model.layers:
        layer.self_attn.key_layernorm.weight.data = torch.linspace(0.2, 3.0, 16)
    packed = PackedModel(model, install(model, method="linear"))
    with pytest.raises(ValueError, match=r"'hunyuan_v1_dense': cached keys of layer 0 .* leave rerotate out"):
        find_pairings(packed)


@starts_interpreter
@pytest.mark.timeout(600)
def test_with_kernels_interpreted() -> None:
    run_interpreted(__file__)


@needs_interpreter
@pytest.mark.parametrize("model_type", ["llama", "gpt_neox", "cohere", "deepseek_v3"])
def test_the_kernel_turns_alike(model_type: str) -> None:
    check_first_layer(model_type, "yarn", 1.0, 2.0, kernels=True)
