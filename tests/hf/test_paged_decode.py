"""The decode kernels, interpreted, against attention written out over keys that are gathered by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from interpreted import needs_interpreter, run_interpreted, starts_interpreter
from paged_cases import TOLERANCE, by_hand, check, check_in_groups, make, singles, turned_by_hand

from e2llm.hf.packed_groups import turns
from e2llm.hf.paged import Extras, LayerShape
from e2llm.hf.paged_decode import BlockTables, attend, cut, most_items, write


@starts_interpreter
@pytest.mark.timeout(600)
def test_the_kernels_interpreted() -> None:
    run_interpreted(__file__)


@needs_interpreter
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_ragged_lengths(dtype: torch.dtype) -> None:
    check([1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 300], dtype=dtype)


@needs_interpreter
@pytest.mark.parametrize("length", [1, 16, 127, 128, 129, 640, 2000])
def test_one_token_alone(length: int) -> None:
    check([length])


@needs_interpreter
def test_a_long_one_beside_short_ones_and_empty_places() -> None:
    check([5, 4000, 0, 70, 0])
    check([0])


@needs_interpreter
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (9, 3), (8, 1), (32, 1)])
def test_shared_key_heads(heads: int, kv_heads: int) -> None:
    check([3, 200, 90], heads=heads, kv_heads=kv_heads)


@needs_interpreter
@pytest.mark.parametrize(
    ("key_dim", "value_dim"), [(8, 8), (32, 32), (64, 64), (80, 80), (96, 64), (128, 128), (192, 128), (256, 256)]
)
def test_head_sizes(key_dim: int, value_dim: int) -> None:
    check([1, 150], key_dim=key_dim, value_dim=value_dim)


@needs_interpreter
@pytest.mark.parametrize("page", [1, 4, 16, 48, 128])
def test_page_sizes(page: int) -> None:
    check([1, page, page + 1, 130], page=page)


@needs_interpreter
@pytest.mark.parametrize("window", [1, 16, 100, 5000])
def test_sliding_windows(window: int) -> None:
    check([1, 17, 100, 101, 700], window=window)


@needs_interpreter
def test_scaling_softcap_and_sinks() -> None:
    sinks = torch.tensor([0.5, -3.0, 9.0, 0.0])
    check([1, 40, 300], extras=Extras(0.3))
    check([1, 40, 300], extras=Extras(1.0, softcap=2.0))
    check([1, 40, 300], extras=Extras(None, None, sinks))
    check([1, 40, 300], extras=Extras(1.0, 2.0, sinks), window=30, dtype=torch.bfloat16)


@needs_interpreter
def test_strided_queries_and_what_is_not_asked_for_stays_unread() -> None:
    """Keys past a length are NaN: an unmasked load would show."""
    shape = LayerShape(2, 32, 32, torch.float32, None)
    lengths = [5, 70]
    query, store, tables, rows = make(lengths, 4, shape, 16)
    expected = [by_hand(query[i], store, tables[rows[i]], n, None, Extras(None)) for i, n in enumerate(lengths)]
    for place, length in enumerate(lengths):
        store[tables[rows[place]][length // 16].long(), length % 16 :] = float("nan")
    most = most_items(2, 2, torch.device("cpu"))
    strided = query.transpose(0, 1).contiguous().transpose(0, 1)
    found = attend(strided, store, shape, tables, singles(lengths, rows, most), None, Extras(None))
    for place in range(2):
        torch.testing.assert_close(found[place].double(), expected[place], rtol=1e-4, atol=1e-5)


@needs_interpreter
@pytest.mark.parametrize(("key_dim", "value_dim"), [(32, 32), (24, 16)])
def test_keys_are_written_where_they_belong(key_dim: int, value_dim: int) -> None:
    shape = LayerShape(2, key_dim, value_dim, torch.float32, None)
    store = torch.zeros(4, 8, 2, key_dim + value_dim)
    key = torch.randn(2, 3, key_dim).transpose(0, 1)  # (G, N, D), as a model gives it
    value = torch.randn(3, 2, value_dim)
    slots = torch.tensor([9, 31, 8])
    write(store, shape, key, value, slots)
    flat = store.flatten(0, 1)
    torch.testing.assert_close(flat[slots], torch.cat((key, value), dim=-1), rtol=0, atol=0)
    flat[slots] = 0
    assert not store.any()


@needs_interpreter
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("pairs", ["halves", "neighbours"])
def test_far_keys_in_groups(dtype: torch.dtype, pairs: str) -> None:
    """Around the edge between near and far, around pages, empty places and other groups beside them."""
    lengths = [1, 36, 37, 38, 39, 47, 48, 49, 0, 53, 54, 70, 165, 166, 700]
    groups = [3, 3, 3, 3, 1, 2, 2, 5, 4, 7, 7, 1, 2, 3, 43]
    check_in_groups(lengths, groups, 37, pairs=pairs, dtype=dtype)


@needs_interpreter
@pytest.mark.parametrize("neighbours", [1, 16, 300, 5000])
def test_few_and_many_near_keys(neighbours: int) -> None:
    check_in_groups([1, 17, 300, 301, 900], [2, 3, 4, 5, 6], neighbours)


@needs_interpreter
@pytest.mark.parametrize("page", [1, 4, 48])
@pytest.mark.parametrize(("key_dim", "value_dim", "rotated"), [(8, 8, 8), (80, 80, 20), (96, 64, 96), (128, 128, 64)])
def test_far_keys_of_any_size(key_dim: int, value_dim: int, rotated: int, page: int) -> None:
    check_in_groups([1, 150], [2, 3], 50, key_dim=key_dim, value_dim=value_dim, rotated=rotated, page=page)
    check_in_groups([40, 150], [2, 3], 30, heads=9, kv_heads=3, key_dim=16, value_dim=8, pairs="neighbours", page=page)


@needs_interpreter
@pytest.mark.parametrize("pairs", ["halves", "neighbours"])
def test_far_keys_are_written_behind_values(pairs: str) -> None:
    shape = LayerShape(2, 24, 16, torch.float32, None, far_dim=24)
    store = torch.zeros(4, 8, 2, shape.width)
    key = torch.randn(2, 3, 24).transpose(0, 1)  # (G, N, D), as a model gives it
    value, slots, inv_freq = torch.randn(3, 2, 16), torch.tensor([9, 31, 8]), torch.tensor([1.0, 0.1, 0.01])
    by = torch.tensor([[0, 5], [-7, 1], [-300, 9]], dtype=torch.int32)
    write(store, shape, key, value, slots, turns(by, inv_freq, pairs))
    far = torch.stack([turned_by_hand(key[n], int(by[n, 0]), inv_freq, pairs) for n in range(3)]).float()
    flat = store.flatten(0, 1)
    torch.testing.assert_close(flat[slots], torch.cat((key, value, far), dim=-1), rtol=1e-4, atol=1e-5)
    flat[slots] = 0
    assert not store.any()


def test_pieces_are_of_one_kind_and_cover_every_key_once() -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        count = int(random.integers(1, 40))
        lengths = random.integers(0, 3000, size=count)
        lengths[random.integers(count)] = random.integers(0, 200_000)
        far = np.minimum(lengths, random.integers(0, 3000, size=count)) * random.integers(0, 2, size=count)
        most = 2 * count + int(random.integers(1, 200))
        items, firsts, counts = cut(lengths, most, far)
        assert items.shape == (most, 3)
        for token, (length, edge) in enumerate(zip(lengths, far, strict=True)):
            mine = items[firsts[token] : firsts[token] + counts[token]]
            assert (mine[:, 0] == token).all() and (mine[:, 1] < mine[:, 2]).all()
            assert mine[:, 1].tolist() == [0, *mine[:-1, 2]][: len(mine)] and (not length or mine[-1, 2] == length)
            assert not ((mine[:, 1] < edge) & (mine[:, 2] > edge)).any()
        assert (items[counts.sum() :, 0] == -1).all()


def test_pieces_are_even_and_cover_every_key_once() -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        count = int(random.integers(1, 40))
        lengths = random.integers(0, 3000, size=count)
        lengths[random.integers(count)] = random.integers(0, 200_000)
        most = count + int(random.integers(1, 200))
        items, firsts, counts = cut(lengths, most)
        assert items.shape == (most, 3)
        for token, length in enumerate(lengths):
            mine = items[firsts[token] : firsts[token] + counts[token]]
            assert (mine[:, 0] == token).all()
            assert mine[:, 1].tolist() == [0, *mine[:-1, 2]][: len(mine)] and (not length or mine[-1, 2] == length)
        assert (items[counts.sum() :, 0] == -1).all()
        sizes = items[: counts.sum(), 2] - items[: counts.sum(), 1]
        assert not len(sizes) or sizes.max() <= max(128, -(-lengths.sum() // (most - count))) + 64
    items, _, counts = cut(np.array([131_072]), 67)
    assert counts[0] > 60, "a long request alone fills the device"


def test_a_request_longer_than_expected_moves_the_tables() -> None:
    tables = BlockTables(2, 3, torch.device("cpu"))
    assert not tables.set(0, np.array([4, 5, 6]))
    assert tables.set(1, np.arange(1, 9))
    assert tables.table[0, :3].tolist() == [4, 5, 6] and tables.table[1, :8].tolist() == list(range(1, 9))
