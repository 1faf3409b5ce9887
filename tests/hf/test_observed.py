"""Watched attention equals transformers' eager weights, and answers as the model's own attention does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import tiny_model, token_ids

from e2llm.hf import install
from e2llm.hf.observed import ATTENTION, observed_attention, observing
from e2llm.infer import Engine


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma2", "gemma3_text", "gpt_oss", "gpt_neox"])
@torch.no_grad()
def test_weights_are_those_of_eager_attention(model_type: str) -> None:
    local: dict[str, Any] = {"sliding_window": 16} if model_type in {"gemma2", "gemma3_text", "gpt_oss"} else {}
    if model_type == "gemma2":
        local["attn_logit_softcapping"] = 0.5  # low enough to bend a random model's scores
    model = tiny_model(model_type, attn_implementation="eager", **local)
    ids = token_ids(1, 50)
    expected = model(input_ids=ids, output_attentions=True)
    engine = Engine(model, None)
    seen: dict[int, torch.Tensor] = {}
    with engine.at_scale(1.0):
        _, cache = engine.prefill(ids[0, :-1].tolist())
        with observing(model, lambda layer, weights: seen.update({layer: weights})):
            logits, _ = engine.step(int(ids[0, -1]), cache)
    torch.testing.assert_close(logits, expected.logits[0, -1], rtol=1e-4, atol=1e-4)
    assert sorted(seen) == [0, 1] and model.config._attn_implementation == "eager"
    for layer, weights in seen.items():
        own = expected.attentions[layer][0, :, -1]
        torch.testing.assert_close(weights, own[:, -weights.shape[1] :], rtol=1e-4, atol=1e-5)
        if model_type != "gpt_oss":  # its sinks take the rest
            torch.testing.assert_close(weights.sum(-1), torch.ones(len(weights)))


@torch.no_grad()
def test_far_keys_are_watched_in_their_groups() -> None:
    """Weights that make the same answer, and of far keys those of one group alike where they hold the same token."""
    model = tiny_model("llama")
    extension = install(model, method="self_extend", neighbours=10)
    ids = token_ids(1, 120)[0].tolist()
    engine = Engine(model, None)
    seen: dict[int, torch.Tensor] = {}
    logits = {}
    for scale in (1, 4):
        with engine.at_scale(scale):
            own = engine.prefill(ids)[0]
            _, cache = engine.prefill(ids[:-1])
            with observing(model, lambda layer, weights: seen.update({layer: weights})):
                logits[scale], _ = engine.step(ids[-1], cache)
            torch.testing.assert_close(logits[scale], own, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(seen[0].sum(-1), torch.ones(len(seen[0])))
    assert (logits[1] - logits[4]).abs().max() > 1e-3
    assert extension.grouping is not None
    group = extension.grouping.group(4)
    alike = [token_ids(1, 1)[0, 0].item()] * 120  # one token: weights differ by distance alone
    with engine.at_scale(4):
        _, cache = engine.prefill(alike[:-1])
        with observing(model, lambda layer, weights: seen.update({layer: weights})):
            engine.step(alike[-1], cache)
    far = seen[0][:, : 110 // group * group].unflatten(-1, (-1, group))
    torch.testing.assert_close(far, far[..., :1].expand_as(far), rtol=1e-4, atol=1e-6)
    assert (far[:, 1:, 0] - far[:, :-1, 0]).abs().max() > 1e-5


def test_what_it_does_not_know_is_refused() -> None:
    module = torch.nn.Module()
    x = torch.zeros(1, 2, 1, 4)
    with pytest.raises(RuntimeError, match="inside `observing`"):
        observed_attention(module, x, x, x, None)
    model = tiny_model("llama")
    with observing(model, lambda layer, weights: None):
        assert model.config._attn_implementation == ATTENTION
        with pytest.raises(ValueError, match="several tokens at once"):
            model(input_ids=token_ids(1, 4))
        with pytest.raises(ValueError, match="asks its watched attention for bias"):
            observed_attention(module, x, x, x, None, bias=x)
    assert model.config._attn_implementation == "sdpa"
