"""A prompt's later chunks: the same attention as with a mask written out, and no mask."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoints import tiny_model
from torch.nn.attention.bias import CausalBias
from transformers import masking_utils

from e2llm.hf import chunks
from e2llm.infer import Engine, hidden_chunks, prefill_chunk_tokens


def by_hand(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    """Each query by itself: the softmax over the keys up to its own, in float64. (B, Q, H, D)."""
    rows = []
    queries, keys, groups = query.shape[2], key.shape[2], query.shape[1] // key.shape[1]
    for q in range(queries):
        seen = keys - queries + q + 1
        heads = []
        for head in range(query.shape[1]):
            k, v = (t[:, head // groups, :seen].double() for t in (key, value))
            weights = torch.softmax(scaling * (k @ query[:, head, q].double().unsqueeze(-1)), dim=1)
            heads.append((weights * v).sum(1))
        rows.append(torch.stack(heads, dim=1))
    return torch.stack(rows, dim=1)


@pytest.mark.parametrize("queries", [1, 5, 12])
@pytest.mark.parametrize("heads", [2, 6])
def test_the_last_query_is_the_last_keys(queries: int, heads: int) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(2, heads, queries, 8), torch.randn(2, 2, 12, 8), torch.randn(2, 2, 12, 8)
    module = SimpleNamespace(num_key_value_groups=heads // 2, is_causal=True)
    found, weights = chunks.chunk_attention(module, query, key, value, None, scaling=0.7)
    assert weights is None
    torch.testing.assert_close(found.double(), by_hand(query, key, value, 0.7), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("given", [{"attention_mask": torch.zeros(1)}, {"position_bias": torch.zeros(1)}])
def test_a_mask_or_a_bias_is_refused(given: dict[str, Any]) -> None:
    given = {"attention_mask": None, **given}
    states = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ValueError, match="mask or a bias"):
        chunks.chunk_attention(SimpleNamespace(), states, states, states, **given)


def test_no_mask_is_built_and_the_models_own_attention_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    orders: list[Any] = []
    attention = chunks.scaled_dot_product_attention

    def watched(*args: Any, **options: Any) -> torch.Tensor:
        orders.append(options["attn_mask"])
        return attention(*args, **options)

    def built(*args: Any, **options: Any) -> None:
        raise AssertionError("a mask was built")

    monkeypatch.setattr(chunks, "scaled_dot_product_attention", watched)
    monkeypatch.setattr(masking_utils, "sdpa_mask", built)
    monkeypatch.setitem(masking_utils.ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "sdpa", built)
    engine = Engine(model, None, chunk_tokens=32)
    with engine.at_scale(4.0):
        pieces = list(hidden_chunks(model, torch.ones(1, 80, dtype=torch.long), 32))
    assert [piece.shape[1] for piece in pieces] == [32, 32, 16]
    assert len(orders) == 2 * model.config.num_hidden_layers
    assert all(isinstance(order, CausalBias) for order in orders)
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(AssertionError, match="a mask was built"):  # what would have happened without
        monkeypatch.setattr("e2llm.infer.needs_no_mask", lambda model: False)
        list(hidden_chunks(model, torch.ones(1, 80, dtype=torch.long), 32))


def test_which_models_need_no_mask() -> None:
    assert chunks.needs_no_mask(tiny_model("llama"))
    assert not chunks.needs_no_mask(tiny_model("gemma3_text"))
    assert not chunks.needs_no_mask(tiny_model("mistral", sliding_window=16))
    eager = tiny_model("llama")
    eager.set_attn_implementation("eager")
    assert not chunks.needs_no_mask(eager)


@pytest.mark.gpu
def test_cuda_chunks_are_the_same_as_with_a_mask_and_stay_large() -> None:
    model = tiny_model("llama").to("cuda", torch.bfloat16)
    assert prefill_chunk_tokens(model, 1_000_000) == 8192
    torch.manual_seed(0)
    query = torch.randn(1, 4, 256, 64, device="cuda", dtype=torch.bfloat16)
    key, value = (torch.randn(1, 2, 1000, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        found, _ = chunks.chunk_attention(SimpleNamespace(), query, key, value, None)
    wanted = by_hand(query.cpu(), key.cpu(), value.cpu(), 64**-0.5)
    torch.testing.assert_close(found.cpu().double(), wanted, atol=2e-2, rtol=2e-2)
