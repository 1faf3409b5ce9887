"""Batches over vLLM's pages, read in groups, against attention by hand whose pairs have positions of their own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from interpreted import needs_interpreter, run_interpreted, starts_interpreter

from e2llm.hf.group_tables import Grouping, rotate
from e2llm.hf.packed import KeyValuePages
from e2llm.hf.paged import Extras, LayerShape
from e2llm.vllm_plugin.grouped_step import NextBatch, batch_step, pages_of

HEADS, KV_HEADS, DIM, PAGE, NEIGHBOURS = 4, 2, 16, 4, 10
INV_FREQ = tuple((10000.0 ** (-torch.arange(0, DIM, 2) / DIM)).tolist())
GROUPING = Grouping(64, NEIGHBOURS, INV_FREQ)
GROUPS = (1, 3, 5, 10, 10)
CUTS = (
    (0, 1, 9, 10, 11, 12, 41),
    (0, 9, 10, 11, 12, 13, 80),
    (0, 30, 31, 32, 33, 40, 75),
    (0, 4, 13, 33, 60, 61, 67),
    (0, 120, 121, 122, 123, 124, 130),
)
"""Tokens of each request after each step: before, at and after the edge, in chunks and one by one."""


def by_hand(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, group: int) -> torch.Tensor:
    """(T, H, D) of one text, from queries and keys that nothing has rotated: Jin et al. 2024, Algorithm 1."""
    places, inv_freq = torch.arange(len(query)), torch.tensor(INV_FREQ)
    q, k, v = query.transpose(0, 1), *(x.transpose(0, 1).repeat_interleave(2, 0) for x in (key, value))
    grouped = places // group

    def scores(of_queries: torch.Tensor, of_keys: torch.Tensor) -> torch.Tensor:
        return rotate(q, of_queries, inv_freq, "halves") @ rotate(k, of_keys, inv_freq, "halves").mT

    distance = places[:, None] - places
    far = scores(grouped + NEIGHBOURS - NEIGHBOURS // group, grouped)
    found = torch.where(distance < NEIGHBOURS, scores(places, places), far) * DIM**-0.5
    return (found.masked_fill(distance < 0, float("-inf")).softmax(-1) @ v).transpose(0, 1)


class Served:
    """Requests of random queries, keys and values, over pages of no order as vLLM allocates them."""

    def __init__(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        random = torch.Generator().manual_seed(0)
        lengths = [cut[-1] for cut in CUTS]
        self.rows = [[torch.randn(n, h, DIM, generator=random) for h in (HEADS, KV_HEADS, KV_HEADS)] for n in lengths]
        needed = [-(-n // PAGE) for n in lengths]
        order = np.random.default_rng(0).permutation(np.arange(1, sum(needed) + 1))
        self.table = torch.zeros(len(CUTS) + 2, max(needed) + 3, dtype=torch.int32)  # as wide as the longest request
        for row, pages in enumerate(np.split(order, np.cumsum(needed)[:-1])):
            self.table[row, : len(pages)] = torch.from_numpy(pages)
        raw = torch.randn(1 + sum(needed), PAGE, KV_HEADS, 3 * DIM, generator=random).to(device, dtype)
        self.cache = raw.transpose(1, 2)  # logical (B, G, S, 3 D), a token's heads side by side
        self.pages = KeyValuePages.borrowed(PAGE, raw.device)
        self.found: list[list[torch.Tensor]] = [[] for _ in CUTS]

    def step(self, turn: int, *, kernels: bool) -> None:
        spans = [(cut[turn], cut[turn + 1]) for cut in CUTS]
        order = sorted(range(len(CUTS)), key=lambda row: spans[row][1] - spans[row][0] > 1)  # single tokens first
        counts = np.array([spans[row][1] - spans[row][0] for row in order])
        parts = []
        for row in order:
            query, key, value = (x[slice(*spans[row])] for x in self.rows[row])
            at = torch.arange(*spans[row]), torch.tensor(INV_FREQ), "halves"
            query, key = (rotate(x.transpose(0, 1), *at).transpose(0, 1) for x in (query, key))
            parts.append((query, key, value))
        store = pages_of(self.cache)
        self.pages.layers[7] = store
        self.pages.shapes[7] = LayerShape(KV_HEADS, DIM, DIM, store.dtype, None, far_dim=DIM)
        told = NextBatch()
        told.tell(np.array([GROUPS[row] for row in order]), GROUPING)
        step = batch_step(
            self.pages,
            self.table[[*order, 5, 6]].to(store.device),  # rows of no request behind them
            np.concatenate(([0], np.cumsum(counts))),
            np.array([spans[row][1] for row in order]),
            told,
            kernels=kernels,
        )
        assert step is not None
        rows = (torch.cat(column).to(store).transpose(0, 1) for column in zip(*parts, strict=True))
        out = step.attend(7, None, *rows, Extras(DIM**-0.5))
        for row, part in zip(order, out.split(counts.tolist()), strict=True):
            self.found[row].append(part.float().cpu())

    def check(self, tolerance: float = 1e-5) -> None:
        for (query, key, value), group, parts in zip(self.rows, GROUPS, self.found, strict=True):
            torch.testing.assert_close(torch.cat(parts), by_hand(query, key, value, group), rtol=0, atol=tolerance)


def serve(*, kernels: bool, **where: Any) -> Served:
    served = Served(**where)
    for turn in range(len(CUTS[0]) - 1):
        served.step(turn, kernels=kernels)
    return served


def test_every_token_of_a_mixed_batch() -> None:
    serve(kernels=False).check()


@starts_interpreter
@pytest.mark.timeout(600)
def test_with_kernels_interpreted() -> None:
    run_interpreted(__file__)


@needs_interpreter
def test_single_tokens_by_kernels() -> None:
    serve(kernels=True).check()


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.06)], ids=str)
def test_on_a_gpu(dtype: torch.dtype, tolerance: float) -> None:
    serve(kernels=True, device="cuda", dtype=dtype).check(tolerance)


def test_far_keys_lie_beside_keys_and_values_in_vllms_memory() -> None:
    served = serve(kernels=False)
    _, key, value = served.rows[2]
    at, inv_freq = torch.arange(75), torch.tensor(INV_FREQ)
    slots = [int(served.table[2, place // PAGE]) * PAGE + place % PAGE for place in range(75)]
    kept = served.cache.transpose(1, 2).flatten(0, 1)[slots].transpose(0, 1)
    expected = [rotate(key.transpose(0, 1), at, inv_freq, "halves"), value.transpose(0, 1)]
    expected.append(rotate(key.transpose(0, 1), at // GROUPS[2], inv_freq, "halves"))
    torch.testing.assert_close(kept, torch.cat(expected, dim=-1), rtol=0, atol=1e-5)


def test_a_cache_that_lies_otherwise_is_refused() -> None:
    with pytest.raises(RuntimeError, match="VLLM_KV_CACHE_LAYOUT"):
        pages_of(torch.zeros(5, KV_HEADS, PAGE, 3 * DIM))


def test_batches_that_vllm_makes_up_are_nobodys() -> None:
    served, told = Served(), NextBatch()
    starts, lengths = np.array([0, 1, 5]), np.array([9, 4])
    assert batch_step(served.pages, torch.zeros_like(served.table), starts, lengths, told, kernels=False) is None
    with pytest.raises(RuntimeError, match="told of nothing"):
        batch_step(served.pages, served.table, starts, lengths, told, kernels=False)


def test_groups_are_told_for_one_batch_alone() -> None:
    batch = NextBatch()
    with pytest.raises(RuntimeError, match="2 requests reached the attention, which was told of nothing"):
        batch.take(2)
    batch.tell(np.array([1, 3]), GROUPING)
    assert batch.take(2)[0].tolist() == [1, 3]
    with pytest.raises(RuntimeError, match="nothing"):
        batch.take(2)
    batch.tell(np.array([1, 3]), GROUPING)
    with pytest.raises(RuntimeError, match="of 3 requests reached the attention, which was told of 2 requests"):
        batch.take(3)
