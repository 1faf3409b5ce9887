"""Attention of grouped training windows against one written here by elements, in float64: forward and gradients.

The kernels run through Triton's interpreter, with blocks so small that every kind of pair of blocks occurs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from interpreted import needs_interpreter, run_interpreted, starts_interpreter

from e2llm.hf import grouped_training as training
from e2llm.hf.grouped_training import KERNELS, Tile, fused, fused_backward, grouped_training

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Case:
    """One call, but for its tensors."""

    heads: int = 4
    kv_heads: int = 2
    tokens: int = 70
    dim: int = 16
    value_dim: int = 16
    groups: tuple[int, ...] = (4, 1)
    segment: int = 20
    """Tokens of one."""
    jump: int = 30
    """Positions between segments."""
    leading: int = 3
    neighbours: int = 40
    biased: bool = True
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    shuffled: bool = False
    """Whether segments come back later in the row."""

    def tensors(self) -> Tensors:
        """query, far_query, key, far_key, value as a layer makes them: heads and tokens swapped, of one projection."""
        draw = torch.Generator().manual_seed(self.tokens + self.dim)
        rows, tokens, dim = len(self.groups), self.tokens, self.dim

        def made(heads: int, width: int) -> torch.Tensor:
            wide = torch.randn(rows, tokens, heads, width + 16, generator=draw)[..., :width]
            return wide.to(self.device, self.dtype).transpose(1, 2).requires_grad_()

        near_far = [made(heads, dim) for heads in (self.heads, self.heads, self.kv_heads, self.kv_heads)]
        return (*near_far, made(self.kv_heads, self.value_dim))

    def rest(self) -> tuple[Any, ...]:
        """The other arguments."""
        rows, order = len(self.groups), torch.arange(self.tokens)
        segments = order // self.segment
        positions = (order + self.jump * segments)[None] + torch.arange(rows)[:, None] * order
        if self.shuffled:
            segments = segments % 2
        bias = 0.2 + torch.rand(rows, self.tokens, generator=torch.Generator().manual_seed(1)) * self.biased
        bias = bias * self.biased
        tensors = (positions, torch.tensor(self.groups), segments.expand(rows, -1), bias)
        return (*(x.to(self.device) for x in tensors), self.leading, self.neighbours, self.dim**-0.5)

    def weights(self) -> torch.Tensor:
        """Of a loss."""
        shape = (len(self.groups), self.heads, self.tokens, self.value_dim)
        drawn = torch.randn(shape, generator=torch.Generator().manual_seed(2))
        return drawn.to(self.device, self.dtype)


def by_elements(
    tensors: Tensors,
    positions: torch.Tensor,
    groups: torch.Tensor,
    segments: torch.Tensor,
    bias: torch.Tensor,
    leading: int,
    neighbours: int,
    scale: float,
) -> torch.Tensor:
    """The definition, a query and a head at a time."""
    query, far_query, key, far_key, value = (x.double() for x in tensors)
    shared = query.shape[1] // key.shape[1]
    found = []
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            g = h // shared
            for i in range(query.shape[2]):
                distance = positions[b, i] - positions[b, : i + 1]
                is_far = (distance >= neighbours) & (groups[b] > 1)
                near = key[b, g, : i + 1] @ query[b, h, i]
                far = far_key[b, g, : i + 1] @ far_query[b, h, i]
                scores = torch.where(is_far, far, near) * scale
                weighed = (segments[b, : i + 1] == segments[b, i]) | (
                    torch.arange(i + 1, device=is_far.device) < leading
                )
                scores = scores - torch.where(weighed, bias[b, i].double(), 0.0)
                found.append(torch.softmax(scores, 0) @ value[b, g, : i + 1])
    return torch.stack(found).view(*query.shape[:3], -1)


def graded(out: torch.Tensor, tensors: Tensors, weights: torch.Tensor) -> list[torch.Tensor]:
    """`out` and the gradients of all tensors."""
    gradients = torch.autograd.grad((out * weights.to(out.dtype)).sum(), tensors)
    return [out.detach(), *gradients]


def compare(case: Case, attend: Any, close: float) -> None:
    """Largest error over the largest number, of each of the six; over 0.1 where all are less, from rounding."""
    tensors, rest, weights = case.tensors(), case.rest(), case.weights()
    found = graded(attend(*tensors, *rest), tensors, weights)
    doubles = tuple(x.detach().double().requires_grad_() for x in tensors)
    wanted = graded(by_elements(doubles, *rest), doubles, weights)
    assert found[0].dtype == case.dtype
    for name, a, b in zip(("out", "query", "far_query", "key", "far_key", "value"), found, wanted, strict=True):
        assert a.shape == b.shape
        error = (a.double() - b).abs().max() / b.abs().max().clamp(min=0.1)
        assert error < close, f"{name}: {error:.2e}"


CASES = {
    "plain": Case(),
    "longer": Case(tokens=130, groups=(21,), segment=33, neighbours=64),
    "one segment": Case(segment=1000, jump=0, neighbours=25),
    "all near": Case(groups=(1, 1)),
    "all far but itself": Case(neighbours=1),
    "no leading": Case(leading=0),
    "many leading": Case(leading=37),
    "no bias": Case(biased=False),
    "segments that come back": Case(shuffled=True),
    "one head": Case(heads=1, kv_heads=1, tokens=33),
    "nine heads": Case(heads=9, kv_heads=3, tokens=40, groups=(5,)),
    "odd heads": Case(dim=24, value_dim=20, tokens=37),
    "fewer tokens than a block": Case(tokens=5, neighbours=2),
    "a block": Case(tokens=32),
    "one token": Case(tokens=1),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_written_out(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "MOST_SCORES", 5000)  # several blocks of queries
    compare(case, grouped_training, 1e-5)


def test_written_out_in_float64() -> None:
    compare(Case(dtype=torch.float64), grouped_training, 1e-9)


@starts_interpreter
def test_kernels() -> None:
    run_interpreted(__file__)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Blocks of different sides, so that each is the larger one once."""
    tiles = (Tile(32, 16, 4, 2), Tile(16, 32, 4, 2), Tile(32, 16, 4, 2))
    monkeypatch.setattr(training, "CHOSEN", dict(zip(KERNELS, tiles, strict=True)))
    yield


def by_kernels(*given: Any) -> torch.Tensor:
    """`grouped_training` as on a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "fuses", lambda query: True)
        return grouped_training(*given)


@needs_interpreter
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_kernels_against_elements(case: Case, small: None) -> None:
    compare(case, by_kernels, 1e-5)


@needs_interpreter
@pytest.mark.parametrize("tiles", [(16, 32), (32, 32), (64, 16)])
def test_every_tile(tiles: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "CHOSEN", dict.fromkeys(KERNELS, Tile(*tiles, 4, 2)))
    compare(Case(tokens=130, heads=2, kv_heads=1, groups=(3,)), by_kernels, 1e-5)


@needs_interpreter
@pytest.mark.parametrize(("dtype", "close"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_half_precision(dtype: torch.dtype, close: float, small: None) -> None:
    compare(replace(CASES["plain"], dtype=dtype), by_kernels, close)


@needs_interpreter
def test_int32_rows_and_channels_apart(small: None) -> None:
    case = Case(tokens=40)
    rows = tuple(x.int() if isinstance(x, torch.Tensor) and not x.is_floating_point() else x for x in case.rest())
    tensors = tuple(x.detach().mT.contiguous().mT.requires_grad_() for x in case.tensors())
    assert tensors[0].stride(-1) != 1
    found = graded(by_kernels(*tensors, *rows), tensors, case.weights())
    wanted = graded(grouped_training(*tensors, *case.rest()), tensors, case.weights())
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@needs_interpreter
def test_everything_is_written(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that the kernels get is full of NaN, and none of it is left."""
    case, empty = Case(tokens=37, groups=(4, 1)), torch.empty_like
    tensors, rest = tuple(x.detach() for x in case.tensors()), case.rest()

    def poisoned(x: torch.Tensor, **given: Any) -> torch.Tensor:
        return empty(x, **given).fill_(float("nan"))

    def made(query: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, log_sums = make(query, value)
        return out.fill_(float("nan")), log_sums.fill_(float("nan"))

    make = training._made
    monkeypatch.setattr(training, "_made", made)
    monkeypatch.setattr(torch, "empty_like", poisoned)
    out, log_sums = fused(*tensors, *rest)
    for found in (out, log_sums, *fused_backward(*tensors, *rest, out, log_sums, case.weights())):
        assert found.isfinite().all()


@pytest.mark.parametrize("kernels", [False, pytest.param(True, marks=needs_interpreter)])
def test_without_groups_and_bias_it_is_causal_attention(kernels: bool, small: None) -> None:
    case = Case(groups=(1, 1), biased=False)
    tensors, rest = case.tensors(), case.rest()
    query, _, key, _, value = tensors
    found = graded((by_kernels if kernels else grouped_training)(*tensors, *rest), tensors, case.weights())
    plain = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    wanted = torch.autograd.grad((plain * case.weights()).sum(), (query, key, value))
    torch.testing.assert_close(found[0], plain)
    for place, gradient in zip((1, 3, 5), wanted, strict=True):
        torch.testing.assert_close(found[place], gradient, rtol=1e-4, atol=1e-5)
    assert not found[2].any() and not found[4].any()


@needs_interpreter
@pytest.mark.parametrize("case", [Case(), Case(tokens=130, segment=33, neighbours=64), Case(biased=False)])
def test_bounds_are_tight(case: Case) -> None:
    """No block of keys is met by both products, or weighed, that need not be."""
    positions, groups, segments, bias, leading, neighbours, _ = case.rest()
    order, size = torch.arange(case.tokens), 16
    distance = positions[:, :, None] - positions[:, None, :]
    far = (distance >= neighbours) & (groups > 1)[:, None, None]
    same = (segments[:, :, None] == segments[:, None, :]) & (bias > 0)[:, :, None]
    rows = training._Rows.of(*case.rest())
    for keys, counts in ((False, far.sum(2)), (True, (~far).sum(1))):
        turns, bounds = rows.bounds(size, keys=keys)
        assert turns.equal(counts.int())
        for block, found in enumerate(bounds.unbind(1)):
            own = slice(block * size, (block + 1) * size)
            assert found[:, 0].equal(counts[:, own].amin(1).int()) and found[:, 1].equal(counts[:, own].amax(1).int())
            weighed = same[:, :, own].any(2) | (bias > 0) * (block * size < leading) if keys else same[:, own].any(1)
            ends = torch.where(weighed, order + 1, 0).amax(1) if keys else torch.where(weighed, order, 999).amin(1)
            assert found[:, 2].equal(ends.clamp(max=case.tokens).int())
            assert keys or found[:, 3].equal(torch.where((bias[:, own] > 0).any(1), leading, 0).int())


@needs_interpreter
def test_the_operator_is_well_formed(small: None) -> None:
    """Schema, shapes and strides of what it promises to a compiler, registration of its gradient."""
    case = Case(tokens=20, groups=(3,), heads=2)
    torch.library.opcheck(fused, (*case.tensors(), *case.rest()))


@needs_interpreter
def test_a_compiled_layer_goes_around_it(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one graph, forward and backward; strides of what comes back are those it was compiled for."""
    case = Case(tokens=20, groups=(3,), neighbours=9)
    tensors, rest, weights = case.tensors(), case.rest(), case.weights()

    def layer(query: torch.Tensor, *others: Any) -> torch.Tensor:
        return grouped_training(query * 2, *others) + 1

    monkeypatch.setattr(training, "fuses", lambda query: True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    found, wanted = (graded(f(*tensors, *rest), tensors, weights) for f in (compiled, layer))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


WRONG = {
    "a divisor": lambda t, r: ((t[0][:, :3], t[1][:, :3], *t[2:]), r),
    "the shape of near ones": lambda t, r: ((t[0], t[1][:, :, 1:], *t[2:]), r),
    "channels": lambda t, r: ((t[0][..., 1:], t[1][..., 1:], *t[2:]), r),
    "one floating dtype": lambda t, r: ((t[0].double(), *t[1:]), r),
    "at most 256": lambda t, r: ((*t[:4], t[4].repeat(1, 1, 1, 17)), r),
    "for groups": lambda t, r: (t, (r[0], r[1][:, None], *r[2:])),
    "use .2, 70.": lambda t, r: (t, (r[0][:, 1:], *r[1:])),
    "leading = -1": lambda t, r: (t, (*r[:4], -1, *r[5:])),
    "neighbours = 0": lambda t, r: (t, (*r[:5], 0, *r[6:])),
    "scale = nan": lambda t, r: (t, (*r[:6], math.nan)),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_fit_is_said(message: str) -> None:
    tensors, rest = WRONG[message](Case().tensors(), Case().rest())
    with pytest.raises(ValueError, match=message):
        grouped_training(*tensors, *rest)


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_TRITON", False)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    with pytest.raises(ValueError, match="pip install triton"):
        grouped_training(*Case().tensors(), *Case().rest())


# On a GPU

GPU = Case(heads=6, kv_heads=2, tokens=1000, dim=64, value_dim=64, groups=(5, 1), segment=130, jump=300, device="cuda")
GPU = replace(GPU, neighbours=256)


def against_written_out(case: Case, close: float, close_gradients: float) -> None:
    """As `compare`, by relative distance, with the written-out path in float64 as the reference."""
    tensors, rest, weights = case.tensors(), case.rest(), case.weights()
    found = graded(grouped_training(*tensors, *rest), tensors, weights)
    doubles = tuple(x.detach().double().requires_grad_() for x in tensors)
    wanted = graded(training.written_out(*doubles, *rest), doubles, weights)
    for limit, a, b in zip((close, *[close_gradients] * 5), found, wanted, strict=True):
        assert (a.double() - b).norm() / b.norm() < limit


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gpu_half_precision(dim: int, dtype: torch.dtype) -> None:
    against_written_out(replace(GPU, dim=dim, value_dim=dim, dtype=dtype), 1e-2, 2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [16, 64])
def test_gpu_float32(dim: int) -> None:
    against_written_out(replace(GPU, dim=dim, value_dim=dim), 1e-3, 1e-3)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
def test_gpu_compiled() -> None:
    case = replace(GPU, dtype=torch.bfloat16)
    tensors, rest, weights = case.tensors(), case.rest(), case.weights()

    def layer(query: torch.Tensor, *others: Any) -> torch.Tensor:
        return grouped_training(query * 0.5, *others) * 2

    compiled = torch.compile(layer, fullgraph=True)
    for a, b in zip(
        graded(compiled(*tensors, *rest), tensors, weights),
        graded(layer(*tensors, *rest), tensors, weights),
        strict=True,
    ):
        assert (a - b).float().norm() / b.float().norm() < 1e-2
