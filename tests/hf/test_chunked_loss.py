"""The loss made in pieces against transformers' own: value and every gradient, in every family."""

from __future__ import annotations

import inspect
import weakref
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from architectures import WINDOW, tiny_model, token_ids
from peft import LoraConfig, get_peft_model
from torch import nn

from e2llm.hf import install
from e2llm.hf.chunked_loss import IGNORED, chunked_forward, summed_nats
from e2llm.hf.head import FullLogitsWarning
from e2llm.hf.teacher import Teacher
from e2llm.positions.placement import PlacementConfig, PositionSampler
from e2llm.positions.scales import ScalesConfig

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama tied": {"tie_word_embeddings": True},
    "gemma2": {"attn_implementation": "eager", "final_logit_softcapping": 2.0},
    "gemma3_text": {},
    "granite": {"logits_scaling": 3.0},
    "cohere": {"logit_scale": 0.25},
    "phi": {},  # an output layer with a bias
    "qwen3_moe": {},
    "gpt_neox": {},
}


def labels_of(ids: torch.Tensor) -> torch.Tensor:
    labels = ids.clone()
    labels[0, :7] = IGNORED
    labels[1, -1] = IGNORED
    return labels


def trained(model: nn.Module, **inputs: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.train().zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_items", [None, 1000])
def test_loss_and_gradients_equal_the_models_own(family: str, num_items: int | None) -> None:
    model = tiny_model(family.split()[0], **FAMILIES[family])
    ids = token_ids(2, 40)
    given = {} if num_items is None else {"num_items_in_batch": num_items}
    inputs = {"input_ids": ids, "labels": labels_of(ids), "use_cache": False, **given}
    loss, gradients = trained(model, **inputs)
    with chunked_forward(model, rows=17):
        output = model(**inputs)
        found, pieces = trained(model, **inputs)
    assert output.logits is None
    torch.testing.assert_close(found, loss, atol=1e-6, rtol=1e-6)
    assert gradients.keys() == pieces.keys() and len(gradients) > 10
    for name, gradient in gradients.items():
        note = partial("{}: {}".format, name)
        torch.testing.assert_close(pieces[name], gradient, atol=1e-6, rtol=1e-4, msg=note)


def test_the_model_is_its_own_again() -> None:
    model = tiny_model("llama")
    ids = token_ids(2, 20)
    signature = inspect.signature(model.forward)
    with chunked_forward(model, rows=8):
        assert inspect.signature(model.forward) == signature, "trainers decide by it what they pass"
        assert model(input_ids=ids).logits.shape == (2, 20, 128), "without labels nothing changes"
    assert "forward" not in vars(model)
    assert model(input_ids=ids, labels=ids).logits is not None


def test_an_adapter_on_the_output_layer_is_trained() -> None:
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    ids = token_ids(2, 24)
    loss, gradients = trained(model, input_ids=ids, labels=labels_of(ids))
    with chunked_forward(model, rows=10):
        found, pieces = trained(model, input_ids=ids, labels=labels_of(ids))
    torch.testing.assert_close(found, loss)
    assert gradients.keys() == pieces.keys() and any("lm_head" in name for name in gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(pieces[name], gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_equals_float64_cross_entropy(dtype: torch.dtype) -> None:
    logits = (torch.randn(50, 300, generator=torch.Generator().manual_seed(0)) * 8).to(dtype)
    targets = torch.arange(50)
    targets[::7] = IGNORED
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, targets, reduction="sum", ignore_index=IGNORED)
    expected.backward()
    nats, gradient = summed_nats(logits, targets)
    assert gradient.dtype == dtype and nats.dtype == torch.float32
    torch.testing.assert_close(nats.double(), expected.detach(), rtol=1e-6, atol=1e-4)
    assert exact.grad is not None
    error = 1e-6 if dtype is torch.float32 else 2**-8
    torch.testing.assert_close(gradient.double(), exact.grad, rtol=error, atol=1e-6)  # softmax - 1 cancels


def test_autocast_stays_close_to_the_models_own() -> None:
    model = tiny_model("llama")
    ids = token_ids(2, 40)
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradients = trained(model, input_ids=ids, labels=ids)
        with chunked_forward(model, rows=16):
            found, pieces = trained(model, input_ids=ids, labels=ids)
    torch.testing.assert_close(found, loss, atol=1e-2, rtol=1e-3)
    for name, gradient in gradients.items():
        difference = (pieces[name] - gradient).norm() / gradient.norm()
        assert difference < 2e-2, f"{name}: {difference}"


def test_no_more_logits_than_asked_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    ids, seen, called = token_ids(2, 40), [], []
    own = nn.Linear.forward

    def spy(layer: nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
        logits = own(layer, hidden)
        if layer is model.lm_head:
            seen.append(logits.shape[0])
        return logits

    monkeypatch.setattr(nn.Linear, "forward", spy)
    with chunked_forward(model, rows=32):
        seen.clear()
        model.lm_head.register_forward_hook(lambda module, inputs, output: called.append(output.shape))
        trained(model, input_ids=ids, labels=ids)
    assert seen == [32, 32, 16]
    assert called == [()], "one call a batch: sharded weights are gathered around it"
    assert model.lm_head(torch.zeros(3, 64)).shape == (3, 128), "the output layer is its own again"


def test_a_pieces_logits_are_gone_before_the_next_ones_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    ids, made, alive = token_ids(2, 40), [], []
    own = nn.Linear.forward

    def spy(layer: nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
        if layer is not model.lm_head:
            return own(layer, hidden)
        alive.append([reference() is not None for reference in made])
        logits = own(layer, hidden)
        made.append(weakref.ref(logits))
        return logits

    monkeypatch.setattr(nn.Linear, "forward", spy)
    with chunked_forward(model, rows=32):
        for found in (made, alive):  # what asked how the output layer works
            found.clear()
        trained(model, input_ids=ids, labels=ids)
    assert alive == [[], [False], [False, False]]


def test_router_losses_keep_the_models_own_forward() -> None:
    model = tiny_model("qwen3_moe", output_router_logits=True)
    ids = token_ids(2, 20)
    loss, _ = trained(model, input_ids=ids, labels=ids)
    with pytest.warns(FullLogitsWarning, match="qwen3_moe: its routers"), chunked_forward(model, rows=8):
        found, _ = trained(model, input_ids=ids, labels=ids)
    assert torch.equal(found, loss)


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi"])
@pytest.mark.parametrize("share", [0.0, 0.4])
def test_tokens_that_count_for_more(family: str, share: float) -> None:
    """Against torch's losses of single tokens from all logits at once; the sum is divided by tokens, not by weights."""
    model = tiny_model(family, **FAMILIES[family])
    install(model, method="yarn")
    teacher = Teacher(model) if share else None
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)
    ids, weights = token_ids(2, 40), torch.ones(2, 40)
    weights[0, 9:12], weights[1, 30:33], weights[1, 0] = 4.0, 0.5, 100.0  # no token is predicted at the first place
    logits = model.train()(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    targets = labels_of(ids)[:, 1:].flatten()
    nats = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")
    if teacher is not None:
        with torch.no_grad():
            theirs = teacher.model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        soft = F.kl_div(logits.log_softmax(-1), theirs.log_softmax(-1), reduction="none", log_target=True).sum(-1)
        nats = (1 - share) * nats + share * soft * (targets != IGNORED)
    expected = (nats * weights[:, 1:].flatten()).sum() / (targets != IGNORED).sum()
    model.zero_grad()
    expected.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    with chunked_forward(model, rows=17, teacher=teacher, distill=share, weighted=True):
        found, pieces = trained(
            model, input_ids=ids, labels=labels_of(ids), loss_weights=weights, use_cache=False
        )
    torch.testing.assert_close(found, expected.detach(), atol=1e-6, rtol=1e-6)
    assert gradients.keys() == pieces.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(pieces[name], gradient, atol=2e-6, rtol=1e-4)


def test_a_model_that_would_pass_over_weights_is_refused() -> None:
    model = tiny_model("qwen3_moe", output_router_logits=True)
    message = r"data\.planted_weight: model type 'qwen3_moe' keeps its own loss.*use data\.planted_weight = 1"
    with (
        pytest.warns(FullLogitsWarning),
        pytest.raises(ValueError, match=message),
        chunked_forward(model, rows=8, weighted=True),
    ):
        pass


def test_evaluation_makes_no_gradients() -> None:
    model = tiny_model("llama").eval()
    ids = token_ids(2, 20)
    with torch.no_grad(), chunked_forward(model, rows=8):
        loss = model(input_ids=ids, labels=ids).loss
    with torch.no_grad():
        torch.testing.assert_close(loss, model(input_ids=ids, labels=ids).loss)
    assert not loss.requires_grad


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "phi"])
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_a_teachers_share_of_the_loss(family: str, share: float) -> None:
    """Against torch's own cross-entropy and kl_div over all logits at once, the teacher read at scale 1."""
    model = tiny_model(family, **FAMILIES[family])
    extension = install(model, method="yarn")
    teacher = Teacher(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)
    ids, placements = token_ids(2, 40), [sampler_of(WINDOW).draw(i, 40) for i in range(2)]
    inputs = {"input_ids": ids, "labels": labels_of(ids), "use_cache": False}
    extension.place(placements)

    def reference() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.train().zero_grad()
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        with torch.no_grad():
            theirs = teacher.model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        targets = labels_of(ids)[:, 1:].flatten()
        kept = targets != IGNORED
        hard = F.cross_entropy(logits[kept], targets[kept])
        soft = F.kl_div(
            logits[kept].log_softmax(-1), theirs[kept].log_softmax(-1), reduction="batchmean", log_target=True
        )
        loss = (1 - share) * hard + share * soft
        loss.backward()
        return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    loss, gradients = reference()
    extension.set_scale(None)  # who enters reads a few tokens of one row
    with chunked_forward(model, rows=17, teacher=teacher, distill=share):
        extension.place(placements)
        found, pieces = trained(model, **inputs)
        held_out = model.eval()(**inputs).loss.detach()
    torch.testing.assert_close(found, loss, atol=1e-6, rtol=1e-5)
    for name, gradient in gradients.items():
        note = partial("{}: {}".format, name)
        torch.testing.assert_close(pieces[name], gradient, atol=1e-6, rtol=1e-4, msg=note)
    torch.testing.assert_close(held_out, model(**inputs).loss, atol=1e-6, rtol=1e-5, msg="held out: plain loss")


def test_a_model_that_is_its_teacher_has_no_loss() -> None:
    model = tiny_model("llama")
    install(model, method="yarn")
    ids = token_ids(2, 24)
    with chunked_forward(model, rows=8, teacher=Teacher(model), distill=1.0):
        loss, gradients = trained(model, input_ids=ids, labels=ids)
    assert abs(float(loss)) < 1e-6
    assert max(float(g.abs().max()) for g in gradients.values()) < 1e-6


def sampler_of(window: int) -> PositionSampler:
    return PositionSampler(
        native_window=window,
        training_window=40,
        scales=ScalesConfig(max_scale=8),
        placement=PlacementConfig(kind="jumps"),
        seed=3,
    )
