"""Each architecture, attention backend, batch and padding: the null plan changes no bit, `linear` is transformers'."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from architectures import statically_scaled, tiny_config, tiny_model, token_ids, with_rope
from torch import nn

from e2llm.hf import install
from e2llm.hf.rotary import find_rotary_owner
from e2llm.positions.placement import Placement

SDPA = (
    "llama mistral qwen2 qwen3 gemma gemma3_text phi phi3 gpt_neox olmo olmo2 olmo3 smollm3 granite starcoder2 "
    "stablelm cohere glm falcon lfm2 modernbert-decoder mixtral qwen2_moe qwen3_moe granitemoe "
    "llama4_text deepseek_v2 deepseek_v3"
).split()
EAGER = ["gemma2", "gpt_oss", "llama", "gemma3_text", "qwen3_moe", "phi3", "cohere", "llama4_text"]
FLEX = ["llama", "gemma3_text", "phi3", "qwen2_moe"]
CASES = [(name, "sdpa") for name in SDPA] + [(name, "eager") for name in EAGER]
CASES += [(name, "flex_attention") for name in FLEX]
LENGTHS = {1: [9], 3: [12, 9, 5]}
"""Batch -> tokens of each row that are no padding, of 12."""

COMPLEX = {"llama4_text", "deepseek_v2"}
"""transformers before 5.23 turns transposed angles into complex numbers, and a CPU's sine of a transposed tensor may
differ in the last bit."""

cases = pytest.mark.parametrize(("name", "attention"), CASES)


@pytest.fixture(autouse=True)
def uncompiled(plain_flex: None) -> None:
    """Every case may use flex attention."""


def batches() -> list[dict[str, torch.Tensor]]:
    """Batch 1 and 3, padded left and right."""
    found = []
    for batch, lengths in LENGTHS.items():
        ids = token_ids(batch, 12)
        for left in (False, True):
            mask = torch.zeros_like(ids)
            for row, length in enumerate(lengths):
                mask[row, 12 - length :] = 1
            mask = mask if left else mask.flip(1)
            found.append({"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask})
    return found


@torch.no_grad()
def logits(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """(B, T, V) where a token attends to something: padding's own logits mean nothing."""
    found = model(**inputs, use_cache=False).logits
    return found[inputs["attention_mask"].bool()]


def assert_same(name: str, ours: torch.Tensor, expected: torch.Tensor) -> None:
    """Bit for bit, where transformers lays out its angles as we do."""
    if name in COMPLEX:
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    else:
        assert torch.equal(ours, expected)


@cases
def test_null_plan_changes_no_bit(name: str, attention: str) -> None:
    model = tiny_model(name, attn_implementation=attention)
    before = [logits(model, inputs) for inputs in batches()]
    extension = install(model, method="linear")
    for inputs, expected in zip(batches(), before, strict=True):
        assert torch.isfinite(expected).all()
        rows = len(inputs["input_ids"])
        for scale in (None, 1.0, [1.0] * rows):
            extension.set_scale(scale)
            assert torch.equal(logits(model, inputs), expected)
        extension.set_scale(3.0)
        assert not torch.equal(logits(model, inputs), expected), "the scale reaches the attention"
        extension.set_scale(None)
        assert torch.equal(logits(model, inputs), expected)
    extension.remove()
    assert all(torch.equal(logits(model, inputs), e) for inputs, e in zip(batches(), before, strict=True))


@cases
def test_linear_is_transformers_own(name: str, attention: str) -> None:
    """Static scaling of transformers, whole batches and row by row with a scale for each row."""
    model = tiny_model(name, attn_implementation=attention)
    scales = [2.0, 1.0, 3.0]
    static = {g: statically_scaled(model, rope_type="linear", factor=g) for g in set(scales)}
    extension = install(model, method="linear")
    for inputs in batches():
        for scale in (2.0, 3.0):
            extension.set_scale(scale)
            assert_same(name, logits(model, inputs), logits(static[scale], inputs))
    extension.set_scale(scales)
    inputs = batches()[-1]
    with torch.no_grad():
        ours = model(**inputs, use_cache=False).logits
        for row, scale in enumerate(scales):
            expected = static[scale](**inputs, use_cache=False).logits
            kept = inputs["attention_mask"][row].bool()
            # Experts are multiplied with the tokens that all rows send them: as many rows, as many roundings.
            torch.testing.assert_close(ours[row, kept], expected[row, kept], rtol=1e-5, atol=1e-5)
            if getattr(model.config, "num_experts_per_tok", None) is None:
                assert_same(name, ours[row, kept], expected[row, kept])


@pytest.mark.parametrize("scale", [1.5, 3.0, 20.0])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "phi", "cohere", "gpt_oss", "deepseek_v2"])
def test_yarn_is_transformers_own(name: str, scale: float) -> None:
    model = tiny_model(name)
    static = statically_scaled(model, rope_type="yarn", factor=scale, original_max_position_embeddings=64)
    install(model, method="yarn").set_scale(scale)
    for inputs in batches():
        assert_same(name, logits(model, inputs), logits(static, inputs))


@pytest.mark.parametrize("tokens", [64, 128, 173])
def test_ntk_is_transformers_dynamic(tokens: int) -> None:
    """`dynamic` with factor 1 takes the scale from the length. Given a length as an integer its table is ours to the
    bit (tests/positions); its forward computes the base in float32 from a tensor, so here to float32 rounding."""
    model = tiny_model("llama")
    dynamic = statically_scaled(model, rope_type="dynamic", factor=1.0)
    install(model, method="ntk").set_scale(tokens / 64)
    ids = token_ids(1, tokens)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    torch.testing.assert_close(logits(model, inputs), logits(dynamic, inputs), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt_neox"])
def test_dynamic_ntk_is_transformers_dynamic_at_every_length_and_while_generating(name: str) -> None:
    model = tiny_model(name)
    dynamic = statically_scaled(model, rope_type="dynamic", factor=1.0)
    extension = install(model, method="dynamic_ntk")
    extension.set_scale(8.0)  # the most it may come to; the length read decides
    for tokens in (40, 64, 100, 173):
        ids = token_ids(1, tokens)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        torch.testing.assert_close(logits(model, inputs), logits(dynamic, inputs), rtol=0, atol=2e-5)
    ids = token_ids(1, 60)
    written = [m.generate(ids, max_new_tokens=30, do_sample=False, eos_token_id=None) for m in (model, dynamic)]
    assert written[0].tolist() == written[1].tolist()  # grows across the native window of 64
    extension.set_scale(1.0)
    assert extension.switches_by_length
    with pytest.raises(ValueError, match="train with 'ntk'"):
        extension.place([Placement(2.0, np.arange(4))])


def test_longrope_is_transformers_own() -> None:
    """Beyond the original window transformers takes the long factors: scale > 1 takes them at once."""
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0 + j for j in range(8)]}
    config = with_rope(tiny_config("llama", max_position_embeddings=256), **rope, original_max_position_embeddings=64)
    model = tiny_model("llama", max_position_embeddings=256, rope_parameters=config.rope_parameters)
    long, short = token_ids(1, 80), token_ids(1, 40)
    with torch.no_grad():
        expected_long, expected_short = model(long).logits, model(short).logits
        extension = install(model, method="longrope")
        assert extension.native_window == 64 and extension.rope.max_scale == 4.0
        assert torch.equal(model(long).logits, expected_long) and torch.equal(model(short).logits, expected_short)
        extension.set_scale(2.0)
        assert torch.equal(model(long).logits, expected_long)
        assert not torch.equal(model(short).logits, expected_short), "fixed for the request, whatever its length now"
        extension.set_scale(1.0)
        assert torch.equal(model(short).logits, expected_short)
        assert not torch.equal(model(long).logits, expected_long), "scale 1 keeps the short factors"
        extension.set_scale(None)
        assert torch.equal(model(long).logits, expected_long), "None is the model as it was, switching included"
        with pytest.raises(ValueError, match=r"scale = 5\.0.*reach scale 4"):
            extension.set_scale(5.0)


@pytest.mark.parametrize("name", ["gemma3_text", "olmo3", "modernbert-decoder"])
def test_local_layers_keep_their_positions(name: str) -> None:
    """A sliding layer never sees a distance that training did not: its tables stay."""
    model = tiny_model(name)
    rotary = find_rotary_owner(model).rotary_emb
    local = next(t for t in set(model.config.layer_types) if "sliding" in t)
    x, ids = torch.zeros(1, 6, 64), torch.arange(6)[None]
    before = {t: rotary(x, ids, t) for t in (local, "full_attention")}
    install(model, method="linear").set_scale(4.0)
    wrapped = find_rotary_owner(model).rotary_emb
    assert torch.equal(wrapped(x, ids, local)[0], before[local][0])
    assert not torch.equal(wrapped(x, ids, "full_attention")[0], before["full_attention"][0])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("gpt2", "learned"),
        ("opt", "learned"),
        ("biogpt", "learned"),
        ("bloom", "ALiBi"),
        ("mpt", "ALiBi"),
        ("gptj", "no rotary embedding on its base model"),
        ("codegen", "no rotary embedding on its base model"),
        ("mamba", "no rotary embedding"),
        ("moshi", "no rotary embedding"),
    ],
)
def test_unsupported(name: str, kind: str) -> None:
    model = tiny_model(name)
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match=f"model type '{name}' has .*{kind}.*supported are .*Llama.*GPT-NeoX"):
        install(model)
    assert dict(model.named_modules()) == modules, "refused before anything was changed"


def test_unsupported_falcon_with_alibi() -> None:
    model = tiny_model("falcon", attn_implementation="eager", alibi=True)
    with pytest.raises(ValueError, match=r"'falcon'.*ALiBi"):
        install(model)
