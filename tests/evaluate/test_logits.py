"""Token losses against cross-entropy over the model's own logits, in families that change the logits last."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from architectures import tiny_model, token_ids

from e2llm.evaluate.logits import TokenScorer
from e2llm.hf.head import FullLogitsWarning, find_head
from e2llm.infer import Engine

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": {"attn_implementation": "eager", "final_logit_softcapping": 2.0},
    "granite": {"logits_scaling": 3.0},
    "hyperclovax": {"logits_scaling": 3.0},
    "cohere": {"logit_scale": 0.25},
    "phi": {},  # an output layer with a bias
}


def reference(model: Any, ids: torch.Tensor, first: int) -> torch.Tensor:
    with torch.no_grad():
        logits = model(input_ids=ids).logits.double()
    return F.cross_entropy(logits[:, first - 1 : -1].transpose(1, 2), ids[:, first:], reduction="none")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("first", [1, 20])
def test_token_nats_equal_the_models_own(family: str, first: int) -> None:
    model = tiny_model(family, **FAMILIES[family])
    scorer = TokenScorer(Engine(model, None))
    ids = token_ids(2, 40)
    with torch.no_grad():
        found = scorer.nats(ids, first=first)
    assert scorer.head is not None
    torch.testing.assert_close(found.double(), reference(model, ids, first), atol=2e-5, rtol=1e-5)


def test_an_unknown_output_step_warns_and_stays_exact() -> None:
    model = tiny_model("llama")
    forward = model.forward

    def changed(*args: Any, **options: Any) -> Any:
        out = forward(*args, **options)
        out.logits = out.logits.sin()
        return out

    model.forward = changed
    with pytest.warns(FullLogitsWarning, match="llama.*GiB at 32768"):
        scorer = TokenScorer(Engine(model, None))
    ids = token_ids(2, 40)
    with torch.no_grad():
        found = scorer.nats(ids, first=3)
    torch.testing.assert_close(found.double(), reference(model, ids, 3), atol=2e-5, rtol=1e-5)


def test_closest_step_wins_when_logits_are_small() -> None:
    """A cap of 30 hardly bends small logits: in bfloat16 both steps lie within rounding, only one is exact."""
    model = tiny_model("gemma2", attn_implementation="eager", final_logit_softcapping=30.0).bfloat16()
    head = find_head(model)
    hidden = torch.randn(4, 64, dtype=torch.bfloat16)
    expected = model.lm_head(hidden) / 30.0
    assert head is not None
    assert torch.equal(head(hidden), torch.tanh(expected) * 30.0)


@pytest.mark.parametrize("first", [0, 40])
def test_first_scored_token_has_context(first: int) -> None:
    scorer = TokenScorer(Engine(tiny_model("llama"), None))
    with pytest.raises(ValueError, match=f"first = {first}"):
        scorer.nats(token_ids(1, 40), first=first)
