"""Packed rows: tables of many scales in one row, which models are read right, which are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from architectures import tiny_model, token_ids

from e2llm.hf import install
from e2llm.hf import packed as packed_module
from e2llm.hf import paged as paged_module
from e2llm.hf.extension import Extension
from e2llm.hf.packed import KeyValuePages, PackedStep, Piece
from e2llm.hf.packed_model import PackedModel
from e2llm.hf.paged import ATTENTION, Extras, attention

READ = (
    "llama mistral qwen2 qwen3 gemma gemma2 gemma3_text phi phi3 gpt_neox olmo olmo2 olmo3 smollm3 granite starcoder2 "
    "stablelm cohere glm mixtral qwen2_moe qwen3_moe deepseek_v2 deepseek_v3 gpt_oss persimmon"
).split()


@pytest.mark.parametrize("name", READ)
def test_models_that_are_read(name: str) -> None:
    """Construction compares the probe's logits itself; here: what it keeps, and that the way back is whole."""
    model = tiny_model(name)
    extension = install(model, method="linear")
    own, ids = model.config._attn_implementation, token_ids(2, 20)
    with torch.no_grad():
        before = model(ids).logits
    packed = PackedModel(model, extension)
    assert model.config._attn_implementation == ATTENTION and len(packed.shapes) == 2
    packed.restore()
    assert model.config._attn_implementation == own and extension.scale is None
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize(
    ("name", "why"),
    [("falcon", "0 of its 2 layers"), ("llama4_text", "chunked_attention"), ("qwen3_next", "0 of its 2 layers")],
)
def test_models_that_are_refused(name: str, why: str) -> None:
    model = tiny_model(name)
    own = model.config._attn_implementation
    with pytest.raises(ValueError, match=rf"model type '{name}': .*{why}.*infer\.Engine"):
        PackedModel(model, install(model, method="linear"))
    assert model.config._attn_implementation == own


def test_a_base_that_switches_by_length_is_refused_unscaled() -> None:
    model = tiny_model("llama", rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0})
    with pytest.raises(ValueError, match="method 'none'"):
        PackedModel(model, install(model, method="none"))


def break_softcap(monkeypatch: pytest.MonkeyPatch) -> None:
    extras = paged_module.Extras
    monkeypatch.setattr(paged_module, "Extras", lambda scaling, softcap, sinks: extras(scaling, None, sinks))


def break_window(monkeypatch: pytest.MonkeyPatch) -> None:
    additive = packed_module._additive
    monkeypatch.setattr(packed_module, "_additive", lambda k, q, window, dtype: additive(k, q, None, dtype))


def break_sinks(monkeypatch: pytest.MonkeyPatch) -> None:
    extras = paged_module.Extras
    monkeypatch.setattr(paged_module, "Extras", lambda scaling, softcap, sinks: extras(scaling, softcap, None))


def break_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    write = torch.Tensor.index_copy_
    monkeypatch.setattr(torch.Tensor, "index_copy_", lambda self, d, i, v: write(self, d, i.flip(0), v))


def break_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = Extension.packed
    monkeypatch.setattr(Extension, "packed", lambda self, scales, which: packed(self, scales, torch.zeros_like(which)))


@pytest.mark.parametrize(
    ("name", "options", "damage"),
    [
        ("gemma2", {"attn_logit_softcapping": 0.5, "query_pre_attn_scalar": 1}, break_softcap),
        ("mistral", {"sliding_window": 6}, break_window),
        ("gpt_oss", {}, break_sinks),
        ("llama", {}, break_slots),
        ("llama", {}, break_scales),
    ],
    ids=["softcap", "window", "sinks", "slots", "scales"],
)
def test_the_probe_sees_what_is_wrong(
    name: str, options: dict[str, Any], damage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(name, **options)
    if name == "gpt_oss":
        for layer in model.model.layers:  # type: ignore[union-attr]
            layer.self_attn.sinks.data.fill_(3.0)  # type: ignore[union-attr]
    extension = install(model, method="linear")
    PackedModel(model, extension).restore()
    damage(monkeypatch)
    with pytest.raises(ValueError, match="other logits than its own"):
        PackedModel(model, extension)


def test_unknown_arguments_of_an_attention_are_refused() -> None:
    model = tiny_model("llama")
    for layer in model.model.layers:  # type: ignore[union-attr]
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: (args, kwargs | {"position_bias": torch.ones(1)}), with_kwargs=True
        )
    with pytest.raises(ValueError, match="asks its attention for position_bias"):
        PackedModel(model, install(model))


def test_a_window_that_the_attention_is_not_told_of_is_refused() -> None:
    model = tiny_model("llama")
    model.config.sliding_window = 8
    with pytest.raises(ValueError, match=r"sliding_attention.*sliding_window = None"):
        PackedModel(model, install(model))


def test_outside_a_step_the_attention_says_so() -> None:
    model = tiny_model("llama")
    PackedModel(model, install(model))
    with pytest.raises(RuntimeError, match="batch engine's step only"):
        model(token_ids(1, 4))


@pytest.mark.parametrize("method", ["linear", "yarn", "ntk"])
@pytest.mark.parametrize("name", ["llama", "cohere", "gpt_oss", "deepseek_v2"])
def test_packed_tables_are_those_of_each_scale(name: str, method: str) -> None:
    """Bit for bit, for every layout of cos and sin; positions far out."""
    model: Any = tiny_model(name)
    extension = install(model, method=method)
    rotary, x = model.model.rotary_emb, torch.zeros(1, 1, 4)
    positions = torch.tensor([[0, 5, 3000, 17, 200_001, 63]])
    scales, which = (1.0, 3.0, 8.0), torch.tensor([0, 1, 2, 2, 1, 0])
    with extension.packed(scales, which):
        found = rotary(x, positions)
    for place, index in enumerate(which.tolist()):
        extension.set_scale(scales[index])
        alone = rotary(x, positions[:, place : place + 1])
        pairs = [(found, alone)] if isinstance(found, torch.Tensor) else zip(found, alone, strict=True)
        for ours, expected in pairs:
            assert torch.equal(ours[:, place : place + 1], expected)


def test_pages_of_any_order_and_pieces_of_any_length() -> None:
    """Three texts in pieces of changing lengths, pages scattered: every token's logits are the whole text's."""
    model = tiny_model("llama")
    packed = PackedModel(model, install(model, method="linear"))
    store = KeyValuePages(packed.shapes, 60, 4, torch.device("cpu"))
    for layer in store.layers.values():
        layer.normal_()  # what earlier owners left is never seen
    texts, scales = [token_ids(1, n, n)[0] for n in (50, 33, 71)], [1.0, 4.0, 8.0]
    order = np.random.default_rng(0).permutation(np.arange(1, 61))
    tables = [order[:13], order[13:22], order[22:40]]
    cuts = [[0, 1, 2, 30, 49, 50], [0, 20, 21, 22, 23, 33], [0, 3, 40, 41, 70, 71]]
    found: list[list[torch.Tensor]] = [[], [], []]
    for turn in range(5):
        spans = [(cut[turn], cut[turn + 1]) for cut in cuts]
        step = PackedStep(store, [Piece(t, a, b - a) for t, (a, b) in zip(tables, spans, strict=True)])
        ids = torch.cat([text[a:b] for text, (a, b) in zip(texts, spans, strict=True)]).numpy()
        lengths = [b - a for a, b in spans]
        with torch.no_grad():
            logits = packed.logits(step, ids, scales, np.repeat([0, 1, 2], lengths), range(sum(lengths)))
        for kept, piece in zip(found, logits.split(lengths), strict=True):
            kept.append(piece)
    packed.restore()
    for text, scale, pieces in zip(texts, scales, found, strict=True):
        packed.extension.set_scale(scale)
        with torch.no_grad():
            torch.testing.assert_close(torch.cat(pieces), model(text[None]).logits[0], rtol=0, atol=1e-4)


def test_single_tokens_of_unlike_lengths_are_attended_apart() -> None:
    model = tiny_model("llama")
    packed = PackedModel(model, install(model))
    store = KeyValuePages(packed.shapes, 400, 16, torch.device("cpu"))
    table = np.arange(1, 401)
    starts = (3, 200, 255, 300, 700, 1000, 5000, 8191, 8192, 8193)
    pieces = [Piece(np.arange(1, 601), start, 1) for start in starts] + [Piece(table, 9, 5)]
    plan = PackedStep(store, pieces)._plan(None, True, torch.float32)
    assert [(s.first, s.count) for s in plan.singles] == [(0, 4), (4, 2), (6, 2), (8, 1), (9, 1)]
    widths = [None if s.mask is None else s.mask.shape[-1] for s in plan.singles]
    assert widths == [304, 1008, 8192, None, None], "no row is padded to the longest of all"
    assert [s.keys for s in plan.singles[3:]] == [slice(0, 8193), slice(0, 8194)]
    assert [(c.first, c.count, c.keys) for c in plan.chunks] == [(10, 5, 14)]


def test_causal_kernels_and_masks_agree() -> None:
    """On a GPU later pieces of a prompt take a causal kernel; its alignment is the mask's."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8, generator=generator) for n in (5, 12, 12))
    seen = torch.arange(12) <= torch.arange(7, 12)[:, None]
    mask = torch.zeros(5, 12).masked_fill(~seen, float("-inf"))
    extras = Extras(0.3)
    torch.testing.assert_close(attention(q, k, v, extras, causal=True), attention(q, k, v, extras, mask=mask))
    capped = attention(q, k, v, Extras(0.3, softcap=1e4), mask=mask)
    torch.testing.assert_close(capped, attention(q, k, v, extras, mask=mask), rtol=0, atol=1e-5)


def test_scores_written_out_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8, generator=generator) for n in (5, 12, 12))
    mask = torch.zeros(5, 12).masked_fill(torch.rand(5, 12, generator=generator) < 0.4, -1e9)
    for sinks in (torch.randn(2, 3, 1, 1, generator=generator), torch.randn(1, 3, 5, 1, generator=generator)):
        for its_mask in (mask, mask[:1], None):
            extras = Extras(None, 20.0, torch.zeros(1))
            whole = attention(q, k, v, extras, mask=its_mask, sinks=sinks)
            with monkeypatch.context() as patch:
                patch.setattr(paged_module, "SCORE_ELEMENTS", 2 * 3 * 12 * 2)
                blocks = attention(q, k, v, extras, mask=its_mask, sinks=sinks)
            torch.testing.assert_close(blocks, whole, rtol=0, atol=1e-6)
