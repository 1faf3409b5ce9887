"""Documents that share a row, under flex attention: what each would be in a row of its own, forward and backward.

Three ways to one loss: every document alone; rows of several under PyTorch's attention with the mask written out; the
same rows under flex attention, whose mask transformers makes of position ids. On a CPU flex attention is PyTorch's
plain form of it; `pytest -m gpu tests/hf/test_flex_documents.py` runs the compiled one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from architectures import WINDOW, tiny_model, token_ids
from torch import nn

from e2llm.hf import install
from e2llm.hf.compiled import compile_layers
from e2llm.hf.extension import Extension
from e2llm.positions.placement import PlacementConfig, PositionSampler
from e2llm.positions.scales import ScalesConfig

LENGTHS = ((150, 131, 23), (9, 200, 95))
"""Tokens of each row's documents: borders inside the kernels' blocks of 128 tokens, and rows unlike each other."""
TOKENS = sum(LENGTHS[0])
FIRST = 40
"""Index of the first draw."""
SAMPLER = PositionSampler(
    native_window=WINDOW,
    training_window=TOKENS,
    scales=ScalesConfig(distribution="log_uniform", max_scale=16),
    placement=PlacementConfig(kind="jumps"),
    seed=3,
)
Found = tuple[float, dict[str, torch.Tensor]]
"""Loss, nats a token, and gradients by name, on the CPU."""


@dataclass(frozen=True)
class Way:
    """How the packed rows are computed."""

    attention: str
    device: str = "cpu"
    compiled: bool = False
    """Each layer, as `train.compile = "layers"` does it."""
    low: bool = False
    """bfloat16 arithmetic."""
    apart: bool = True
    """Position ids start again at each document."""


def extended(attention: str, device: str) -> tuple[nn.Module, Extension]:
    model = tiny_model("llama", attn_implementation=attention).to(device).train()
    return model, install(model, method="yarn")


def documents() -> Iterator[tuple[int, int, int]]:
    """(row, first token, tokens), row by row."""
    for row, lengths in enumerate(LENGTHS):
        for number, length in enumerate(lengths):
            yield row, sum(lengths[:number]), length


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}


def alone(own_draws: bool) -> Found:
    """Each document in a row of its own, PyTorch's attention on a CPU, float32: nothing is packed and nothing masked
    but what comes later. Without draws of their own, documents of a row stand where the row's draw says."""
    model, extension = extended("sdpa", "cpu")
    ids, total, count = token_ids(len(LENGTHS), TOKENS), 0.0, sum(length - 1 for *_, length in documents())
    for number, (row, start, length) in enumerate(documents()):
        draw = SAMPLER.draw_document(FIRST + number, length) if own_draws else SAMPLER.draw(FIRST + row, TOKENS)
        extension.place([draw])
        tokens = ids[row, start : start + length]
        logits = model(input_ids=tokens[None], use_cache=False).logits[0]
        loss = F.cross_entropy(logits[:-1], tokens[1:], reduction="sum") / count
        loss.backward()
        total += loss.item()
    return total, gradients(model)


def written_out() -> torch.Tensor:
    """(B, 1, T, T) bool: whether a query sees a key, document by document."""
    mask = torch.zeros(len(LENGTHS), 1, TOKENS, TOKENS, dtype=torch.bool)
    for row, start, length in documents():
        mask[row, 0, start : start + length, start : start + length] = torch.ones(length, length).tril().bool()
    return mask


def packed(way: Way, own_draws: bool) -> Found:
    """Rows as they are, all documents in them."""
    model, extension = extended(way.attention, way.device)
    if own_draws:
        extension.sampler = SAMPLER
        extension.expect(range(FIRST, FIRST + sum(map(len, LENGTHS))))
    else:
        extension.place([SAMPLER.draw(FIRST + row, TOKENS) for row in range(len(LENGTHS))])
    if way.compiled:
        compile_layers(model)
    ids = token_ids(len(LENGTHS), TOKENS)
    labels, positions = ids.clone(), torch.empty_like(ids)
    for row, start, length in documents():
        labels[row, start] = -100  # nothing before a document may be seen
        positions[row, start : start + length] = torch.arange(length)
    given = {"position_ids": positions if way.apart else None}
    given |= {"attention_mask": written_out()} if way.attention == "sdpa" and way.apart else {}
    moved = {name: tensor.to(way.device) for name, tensor in given.items() if tensor is not None}
    with torch.autocast(way.device, torch.bfloat16, enabled=way.low):
        found = model(input_ids=ids.to(way.device), labels=labels.to(way.device), use_cache=False, **moved)
    found.loss.backward()
    return float(found.loss.detach()), gradients(model)


def farthest(found: Found, expected: Found) -> float:
    """Of all gradients' distances, relative to their own length, the largest."""
    assert found[1].keys() == expected[1].keys()
    return max(float((found[1][name] - own).norm() / own.norm()) for name, own in expected[1].items())


DRAWS = pytest.mark.parametrize("own_draws", [True, False], ids=["a draw a document", "a draw a row"])


@pytest.mark.usefixtures("plain_flex")
@DRAWS
@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
def test_packed_documents_learn_what_they_do_alone(attention: str, own_draws: bool) -> None:
    """Each with a scale and places of its own: `e2llm.extend` draws for each document, our trainer for each row."""
    expected, found = alone(own_draws), packed(Way(attention), own_draws)
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert farthest(found, expected) < 2e-5


@pytest.mark.usefixtures("plain_flex")
def test_documents_that_see_each_other_are_found_out() -> None:
    expected, found = alone(False), packed(Way("flex_attention", apart=False), False)
    assert abs(found[0] - expected[0]) > 1e-3 and farthest(found, expected) > 0.2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")
@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask")
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@DRAWS
@pytest.mark.parametrize("compiled", [False, True], ids=["kernel", "layers compiled"])
@pytest.mark.parametrize("low", [False, True], ids=["float32", "bfloat16"])
def test_compiled_flex_attention_learns_what_documents_do_alone(low: bool, compiled: bool, own_draws: bool) -> None:
    """The Triton kernels, forward and backward, against every document alone in float32 on the CPU, and no farther from
    it than PyTorch's attention on the same device with the mask written out."""
    torch._dynamo.reset()
    expected = alone(own_draws)
    ways = {name: Way(name, "cuda", compiled=compiled, low=low) for name in ("sdpa", "flex_attention")}
    found = {name: packed(way, own_draws) for name, way in ways.items()}
    loss, gradient = (5e-4, 5e-2) if low else (2e-4, 1e-2)
    for name, one in found.items():
        assert one[0] == pytest.approx(expected[0], rel=loss), name
    apart = {name: farthest(one, expected) for name, one in found.items()}
    assert apart["flex_attention"] < max(2 * apart["sdpa"], gradient), apart
