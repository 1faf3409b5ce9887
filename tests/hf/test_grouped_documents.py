"""Documents that share a row, with far keys in groups: each is read as in a row of its own, trained and served."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from architectures import WINDOW, tiny_model, token_ids
from interpreted import needs_interpreter, run_interpreted, starts_interpreter
from torch import nn

import e2llm.hf.grouped_documents as documents
import e2llm.hf.grouped_training as training
from e2llm.hf import install
from e2llm.hf.extension import Extension
from e2llm.hf.grouped_documents import buckets, grouped_documents
from e2llm.hf.grouped_training import KERNELS, Tile, grouped_training
from e2llm.positions.placement import PlacementConfig, PositionSampler
from e2llm.positions.scales import ScalesConfig

LENGTHS = [[20, 3, 17], [40]]
NEIGHBOURS = 6
IDS = token_ids(2, 40)
RESTARTING = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in LENGTHS])
SAMPLER = PositionSampler(
    native_window=WINDOW,
    training_window=40,
    scales=ScalesConfig(distribution="log_uniform", max_scale=16),
    placement=PlacementConfig(kind="jumps", far_weight=1.0, leading_tokens=2),
    seed=3,
)


def extended(name: str) -> tuple[nn.Module, Extension]:
    model = tiny_model(name)
    extension = install(model, method="self_extend", native_window=WINDOW, neighbours=NEIGHBOURS)
    return model, extension


def alone() -> Iterator[tuple[int, slice]]:
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for length in lengths:
            yield row, slice(start, start + length)
            start += length


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_each_document_trains_as_in_a_row_of_its_own(name: str) -> None:
    """Logits and gradients; local layers of Gemma 3 too."""
    model, extension = extended(name)
    extension.sampler = SAMPLER
    model.train()
    extension.expect([40, 41, 42, 43])
    packed = model(input_ids=IDS, position_ids=RESTARTING, use_cache=False).logits
    packed.square().sum().backward()
    found = {key: value.grad.clone() for key, value in model.named_parameters()}
    model.zero_grad()
    extension.sampler = None
    groups = set()
    for number, (row, own) in enumerate(alone()):
        draw = SAMPLER.draw_document(40 + number, own.stop - own.start)
        groups.add(extension.grouping.group(draw.scale))
        extension.place([draw])
        logits = model(input_ids=IDS[row : row + 1, own], use_cache=False).logits
        torch.testing.assert_close(packed[row : row + 1, own], logits, atol=2e-5, rtol=1e-4)
        logits.square().sum().backward()
    assert len(groups) > 2 and max(groups) > 1
    for key, value in model.named_parameters():
        torch.testing.assert_close(found[key], value.grad, atol=2e-4, rtol=1e-3, msg=key)


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
@pytest.mark.parametrize("scale", [1.0, 4.0, (4.0, 2.0)])
@torch.no_grad()
def test_each_document_is_read_as_in_a_row_of_its_own(name: str, scale: Any) -> None:
    """Where position ids begin again and no mask says what is padding; at scale 1 too."""
    model, extension = extended(name)
    model.eval()
    extension.set_scale(scale)
    packed = model(input_ids=IDS, position_ids=RESTARTING, use_cache=False).logits
    whole = model(input_ids=IDS, use_cache=False).logits
    for row, own in alone():
        extension.set_scale(scale[row] if isinstance(scale, tuple) else scale)
        logits = model(input_ids=IDS[row : row + 1, own], use_cache=False).logits
        torch.testing.assert_close(packed[row : row + 1, own], logits, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(packed[0, 23:], whole[0, 23:], atol=1e-3), "documents would be seen by each other"
    extension.set_scale(scale)
    torch.testing.assert_close(model(input_ids=IDS, use_cache=False).logits, whole)


def test_buckets_hold_each_token_once() -> None:
    lengths = torch.tensor([1, 5, 8, 3, 9, 16, 4])
    targets, read = [], 0
    for bucket in buckets(lengths, torch.device("cpu")):
        read += bucket.sources.numel()
        targets += bucket.targets.tolist()
        assert bucket.sources.reshape(-1)[bucket.inside].tolist() == bucket.targets.tolist()
        assert lengths[bucket.numbers].tolist() == (bucket.beyond == 0).sum(1).tolist()
        assert bool((bucket.sources.diff(dim=1) + (bucket.beyond[:, 1:] > 0) == 1).all()), "places follow each other"
    assert sorted(targets) == list(range(int(lengths.sum()))) and read < 2 * lengths.sum()


def case(dtype: torch.dtype = torch.float32) -> tuple[list[torch.Tensor], tuple[Any, ...]]:
    """Random heads of two rows with four documents, and the rest of the arguments."""
    draw = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 40, 8), (2, 4, 40, 8), (2, 2, 40, 8), (2, 2, 40, 8), (2, 2, 40, 12)]
    heads = [torch.randn(shape, generator=draw).to(dtype).requires_grad_() for shape in shapes]
    positions = torch.cat([torch.arange(n) * 2 + 5 for row in LENGTHS for n in row]).view(2, 40)
    segments = torch.cat([torch.arange(n) // 7 for row in LENGTHS for n in row]).view(2, 40)
    bias = torch.rand(2, 40, generator=draw)
    lengths = torch.tensor([n for row in LENGTHS for n in row])
    return heads, (positions, torch.tensor([3, 1, 2, 4]), segments, bias, lengths, 2, NEIGHBOURS, 0.4)


@starts_interpreter
def test_kernels() -> None:
    run_interpreted(__file__)


@needs_interpreter
def test_kernels_are_those_of_each_document(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "CHOSEN", dict.fromkeys(KERNELS, Tile(16, 16, 4, 2)))
    monkeypatch.setattr(documents, "fuses", lambda query: True)
    heads, (positions, groups, segments, bias, lengths, *sizes) = case()
    out = grouped_documents(*heads, positions, groups, segments, bias, lengths, *sizes)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad((out * weights).sum(), heads)
    total = 0.0
    for number, (row, own) in enumerate(alone()):
        part = [x[row : row + 1, :, own] for x in heads]
        rows = [x[row : row + 1, own] for x in (positions, segments, bias)]
        one = grouped_training(*part, rows[0], groups[number : number + 1], *rows[1:], *sizes)
        torch.testing.assert_close(out[row : row + 1, :, own], one, atol=1e-5, rtol=1e-5)
        total = total + (one * weights[row : row + 1, :, own]).sum()
    for ours, theirs in zip(found, torch.autograd.grad(total, heads), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@needs_interpreter
def test_the_operator_is_well_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "CHOSEN", dict.fromkeys(KERNELS, Tile(16, 16, 4, 2)))
    heads, rest = case()
    torch.library.opcheck(documents.fused_documents, (*heads, *rest))


def test_lengths_that_do_not_fill_the_rows() -> None:
    heads, (positions, groups, segments, bias, lengths, *sizes) = case()
    with pytest.raises(ValueError, match="3 of together 43 tokens and 4 groups; the rows hold 80 tokens"):
        grouped_documents(*heads, positions, groups, segments, bias, lengths[[0, 1, 0]], *sizes)

