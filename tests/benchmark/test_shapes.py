"""FLOPs a token against torch's own counter, and shapes against the models that they are named for."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode

from e2llm.benchmark.shapes import SHAPES, Shape, flops_per_token, quick_model, random_model, shape_of

WINDOW, BATCH = 64, 2


def counted(model: torch.nn.Module) -> float:
    """FLOPs a token of one forward and backward, as torch counts them: attention over the whole square."""
    ids = torch.zeros(BATCH, WINDOW, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    return counter.get_total_flops() / (BATCH * WINDOW)


def formula(model: torch.nn.Module, **changes: int) -> float:
    shape = SHAPES["tiny"]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - trained
    sizes = {"layers": shape.num_hidden_layers, "width": shape.hidden_size, "window": WINDOW}
    return flops_per_token(**{"trained": trained, "frozen": frozen, **sizes, **changes})


ANGLES = 2e-5
"""Older transformers make the angles of the rotary embedding by a matrix product: some operations a token."""


def eager(**changes: bool) -> torch.nn.Module:
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(shape_of("tiny").config(attn_implementation="eager", **changes))


def test_all_weights_trained() -> None:
    model = eager()
    attention = 6 * 2 * 64 * WINDOW  # the half of the square that a causal kernel leaves out
    norms = 6 * sum(p.numel() for name, p in model.named_parameters() if "norm" in name)  # no matrix products
    assert counted(model) == pytest.approx(formula(model) + attention - norms, rel=ANGLES)


def test_untied_embeddings_count_although_looking_up_costs_nothing() -> None:
    model = eager(tie_word_embeddings=False)
    embeddings = 6 * 4096 * 64
    assert formula(model) - formula(eager()) == embeddings
    assert counted(model) == pytest.approx(counted(eager()))


def test_frozen_weights_under_adapters() -> None:
    model = get_peft_model(eager(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    attention = 6 * 2 * 64 * WINDOW
    norms = 4 * sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
    # The first layer's input needs no gradient: its query, key and value weights and their adapters' first halves cost
    # less.
    saved = 2 * (64 * (64 + 32 + 32) + 3 * 4 * 64)
    assert counted(model) == pytest.approx(formula(model) + attention - norms - saved, rel=ANGLES)


@pytest.mark.parametrize(
    ("name", "weights"),
    [("smollm2-135m", 134_515_008), ("llama-1b", 1_235_814_400), ("llama-2-7b", 6_738_415_616)],
)
def test_shapes_have_as_many_weights_as_the_models(name: str, weights: int) -> None:
    """Published counts: SmolLM2-135M, Llama 3.2 1B, Llama 2 7B."""
    model = random_model(shape_of(name), dtype="bfloat16", device="meta")
    assert sum(p.numel() for p in model.parameters()) == weights
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_random_weights_are_the_same_every_time_and_leave_the_default_dtype() -> None:
    first, second = (random_model(shape_of("tiny"), dtype="bfloat16", device="cpu") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert torch.get_default_dtype() == torch.float32


def test_unknown_shape() -> None:
    with pytest.raises(ValueError, match=r"shape = 'llama-1': no such shape; did you mean 'llama-1b'"):
        shape_of("llama-1")


def test_a_quick_model_is_whole_tied_and_turns_as_the_other_does() -> None:
    model, other = (make(shape_of("tiny"), dtype="bfloat16") for make in (quick_model, _on_cpu))
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in other.named_parameters()}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.model.rotary_emb.inv_freq, other.model.rotary_emb.inv_freq)
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    spread = model.model.layers[0].mlp.up_proj.weight.float().std().item()
    assert spread == pytest.approx(0.02, rel=0.05) and model.model.norm.weight.eq(1).all()
    again = quick_model(shape_of("tiny"), dtype="bfloat16")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        assert torch.equal(logits, again(input_ids=ids).logits) and logits.isfinite().all()


def _on_cpu(shape: Shape, dtype: str) -> torch.nn.Module:
    return random_model(shape, dtype=dtype, device="cpu")
