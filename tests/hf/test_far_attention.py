"""Far keys that count for more: the added channels against a mask that is written out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from architectures import WINDOW, tiny_model, token_ids
from far_masks import written_out
from torch import nn
from transformers import AutoConfig

import e2llm
from e2llm.hf import attend_far, attending_far, install
from e2llm.hf.extension import Extension
from e2llm.positions.placement import Placement, PlacementConfig, PositionSampler
from e2llm.positions.scales import ScalesConfig

TOKENS = 40
FAMILIES = ("llama", "qwen3", "gpt_neox", "phi", "deepseek_v3", "qwen3_moe", "glm4")
LOCAL = ("cohere2", "olmo3", "gemma3_text")
"""With layers of a sliding window."""


def sampler(weight: float = 1.0, **placement: object) -> PositionSampler:
    return PositionSampler(
        native_window=WINDOW,
        training_window=TOKENS,
        scales=ScalesConfig(max_scale=16),
        placement=PlacementConfig(**{"kind": "jumps", "max_jumps": 5, "far_weight": weight, **placement}),
        seed=5,
    )


def biased(model: nn.Module, extension: Extension, ids: torch.Tensor, drawn: list[Placement]) -> torch.Tensor:
    """Logits by the model's own attention with the mask written out."""
    plain = [Placement(p.scale, p.positions) for p in drawn]
    extension.place(plain)
    mask = torch.stack([written_out(p, 4) for p in drawn])[:, None]
    return model(ids, attention_mask=mask, use_cache=False).logits


def gradients(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("family", FAMILIES)
def test_added_channels_are_the_mask_written_out(family: str) -> None:
    model = tiny_model(family).train()
    extension = install(model)
    ids, drawn = token_ids(3, TOKENS), [sampler().draw(index) for index in range(3)]
    assert any(p.far is not None and p.far.bias.max() > 1 for p in drawn)
    wanted = biased(model, extension, ids, drawn)
    wanted.square().mean().backward()
    of_mask = gradients(model)
    model.zero_grad()
    extension.place([Placement(p.scale, p.positions) for p in drawn])
    once = model(ids, use_cache=False).logits
    attend_far(model)
    extension.place(drawn)
    found = model(ids, use_cache=False).logits
    found.square().mean().backward()
    size = wanted.norm()
    assert (found - wanted).norm() / size < 1e-5
    assert (gradients(model) - of_mask).norm() / of_mask.norm() < 1e-4
    assert (once - wanted).norm() / size > 1e-3, "and the weight does something"


@pytest.mark.parametrize("family", LOCAL)
def test_layers_of_a_sliding_window_stay_as_they_are(family: str) -> None:
    model = tiny_model(family, layer_types=["sliding_attention", "full_attention"]).train()
    extension = install(model)
    ids, drawn = token_ids(2, TOKENS), [sampler().draw(index) for index in range(2)]
    masks = {  # the window is longer than the text
        "full_attention": torch.stack([written_out(p, 4) for p in drawn])[:, None],
        "sliding_attention": torch.full((1, 1, TOKENS, TOKENS), float("-inf")).triu(1),
    }
    with torch.no_grad():
        extension.place([Placement(p.scale, p.positions) for p in drawn])
        wanted = model(ids, attention_mask=masks, use_cache=False).logits
        once = model(ids, use_cache=False).logits
        attend_far(model)
        extension.place(drawn)
        found = model(ids, use_cache=False).logits
    assert (found - wanted).norm() / wanted.norm() < 1e-5
    assert (once - wanted).norm() / wanted.norm() > 1e-3


def test_evaluation_and_scales_are_untouched() -> None:
    model, twin = tiny_model("llama"), tiny_model("llama")
    extension, other = install(model), install(twin)
    attend_far(model)
    ids = token_ids(2, TOKENS)
    for scale in (None, 4.0):
        extension.set_scale(scale)
        other.set_scale(scale)
        assert torch.equal(model(ids).logits, twin(ids).logits)


def test_documents_that_share_a_row_are_weighed_as_in_rows_of_their_own() -> None:
    model = tiny_model("llama").train()
    extension = install(model)
    attend_far(model)
    extension.sampler = sampler()
    ids = token_ids(1, TOKENS)
    lengths = [22, 14, 4]  # the last is too short for a jump
    extension.expect([7, 8, 9])
    restarting = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = model(ids, position_ids=restarting, use_cache=False).logits
    parts = []
    for index, part in zip((7, 8, 9), ids.split(lengths, dim=1), strict=True):
        extension.sampler = None
        extension.place([sampler().draw_document(index, part.shape[1])])
        parts.append(model(part, use_cache=False).logits)
    assert torch.allclose(packed, torch.cat(parts, dim=1), atol=1e-4)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own tracing
def test_recomputed_and_compiled_layers_give_the_same() -> None:
    ids, drawn = token_ids(2, TOKENS), [sampler().draw(index) for index in range(2)]
    found = []
    for kind in ("plain", "recomputed", "compiled"):
        model = tiny_model("llama").train()
        extension = install(model)
        attend_far(model)
        if kind == "recomputed":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if kind == "compiled":
            torch._dynamo.reset()
            for layer in model.model.layers:
                layer.compile(backend="eager")  # traced whole, computed as it is
        extension.place(drawn)
        loss = model(ids, use_cache=False).logits.square().mean()
        loss.backward()
        found.append((loss.detach(), gradients(model)))
    for loss, gradient in found[1:]:
        assert torch.allclose(loss, found[0][0], rtol=1e-6)
        assert (gradient - found[0][1]).norm() / gradient.norm() < 1e-5
    torch._dynamo.reset()


def test_a_model_that_attends_so_already_can_be_extended_anew() -> None:
    model = tiny_model("llama").train()
    install(model).remove()
    first = install(model)
    attend_far(model)
    first.remove()  # by hand, without the attention
    extension = install(model)
    attend_far(model)
    extension.place([sampler().draw(0)])
    assert model(token_ids(1, TOKENS), use_cache=False).logits.isfinite().all()


def test_what_cannot_is_refused_and_left_as_it_was() -> None:
    model = tiny_model("llama", attn_implementation="eager")
    extension = install(model)
    with pytest.raises(ValueError, match=r"attention 'eager' cannot weigh far keys; load the model with .* 'sdpa'"):
        attend_far(model)
    assert not extension.attends_far and model.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="the model's attention does not know it yet"):
        extension.place([sampler().draw(0)])
    with pytest.raises(ValueError, match="is not extended"):
        attend_far(tiny_model("llama"))


def test_a_model_that_does_not_hand_tables_on_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    install(model)
    for layer in model.model.layers:
        own = layer.forward
        layer.forward = lambda *args, own=own, far_tables=None, **kwargs: own(*args, **kwargs)
    with pytest.raises(ValueError, match="'llama' do not hand its tables on"):
        attend_far(model)
    assert model.config._attn_implementation == "sdpa"


def test_a_batch_has_one_far_weight() -> None:
    model = tiny_model("llama")
    extension = install(model)
    with attending_far(model), pytest.raises(ValueError, match="one far_weight"):
        extension.place([sampler().draw(0), sampler(0.0).draw(1)])
    assert model.config._attn_implementation == "sdpa" and not extension.attends_far


def test_from_python_extend_attends_and_restore_undoes_it(tmp_path: Path) -> None:
    model = tiny_model("llama").train()
    ids = token_ids(2, TOKENS)
    before = model(ids).logits
    config = PlacementConfig(kind="jumps", max_jumps=5, far_weight=1.0)
    e2llm.extend(model, placement=config, training_window=TOKENS)
    assert not torch.allclose(model(ids, use_cache=False).logits, before)
    model.save_pretrained(tmp_path)
    assert "e2llm_far" not in (tmp_path / "config.json").read_text()
    assert AutoConfig.from_pretrained(tmp_path).model_type == "llama"
    e2llm.restore(model)
    assert model.config._attn_implementation == "sdpa" and torch.equal(model(ids).logits, before)
    eager = tiny_model("llama", attn_implementation="eager")
    with pytest.raises(ValueError, match="far_weight"):
        e2llm.extend(eager, placement=config, training_window=TOKENS)
    assert e2llm.hf.get_extension(eager) is None
