"""Attention joined out of causal squares equals the one that writes every score, for all ways that blocks fall."""

from __future__ import annotations

import pytest
import torch

from e2llm.hf.grouped_attention import attend, can_group, grouped_attention

SCALE = 0.3


def written(
    query: torch.Tensor,
    far_query: torch.Tensor,
    key: torch.Tensor,
    far_key: torch.Tensor,
    value: torch.Tensor,
    near: int,
) -> torch.Tensor:
    queries, keys = query.shape[2], key.shape[2]
    distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
    scores = torch.where(distance < near, query @ key.transpose(-1, -2), far_query @ far_key.transpose(-1, -2)) * SCALE
    return scores.masked_fill(distance < 0, float("-inf")).softmax(-1) @ value


def drawn(queries: int, keys: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(queries * 1000 + keys)
    sizes = (queries, queries, keys, keys, keys)
    return [torch.randn(2, 3, size, 8, generator=random, dtype=torch.float64).to(dtype) for size in sizes]


@pytest.mark.parametrize("near", [1, 2, 5, 8, 40])
@pytest.mark.parametrize("queries", [2, 5, 8, 16, 37])
@pytest.mark.parametrize("before", [0, 1, 5, 8, 41, 80])
def test_equals_written_scores(near: int, queries: int, before: int) -> None:
    given = drawn(queries, before + queries)
    if not can_group(queries, before + queries, near):
        assert 0 < before < near
        return
    found = grouped_attention(*given, near, SCALE)
    torch.testing.assert_close(found, written(*given, near), rtol=1e-5, atol=1e-5)


def test_sixteen_bits() -> None:
    given = drawn(70, 70, torch.bfloat16)
    found = grouped_attention(*given, 16, SCALE)
    assert found.dtype == torch.bfloat16
    exact = written(*(x.double() for x in given), 16)
    assert (found.double() - exact).norm() / exact.norm() < 0.01


def test_sums_are_natural_logarithms() -> None:
    """torch does not document them: this is what everything is joined by."""
    query, _, key, _, value = drawn(9, 9)
    scores = (query @ key.transpose(-1, -2) * SCALE).masked_fill(torch.ones(9, 9).triu(1).bool(), float("-inf"))
    sums = attend(query, key, value, SCALE, causal=True)[1]
    torch.testing.assert_close(sums.double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("before", [0, 512])
def test_on_a_gpu(before: int) -> None:
    given = [x.cuda() for x in drawn(1000, before + 1000, torch.bfloat16)]
    found = grouped_attention(*given, 128, SCALE)
    exact = written(*(x.double().cpu() for x in given), 128)
    assert (found.double().cpu() - exact).norm() / exact.norm() < 0.01
