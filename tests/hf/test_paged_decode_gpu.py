"""The decode kernels compiled, on a CUDA device: `pytest -m gpu tests/hf/test_paged_decode_gpu.py`."""

from __future__ import annotations

import pytest
import torch
from paged_cases import TOLERANCE, check, check_in_groups, turned_by_hand

from e2llm.hf.packed_groups import turns
from e2llm.hf.paged import Extras, LayerShape
from e2llm.hf.paged_decode import write

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("dim", [16, 32, 64, 80, 96, 128, 256])
def test_ragged_lengths(dtype: torch.dtype, dim: int) -> None:
    lengths = [1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 0, 1000, 9000, 5]
    check(lengths, heads=8, kv_heads=2, key_dim=dim, value_dim=dim, dtype=dtype, device="cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_long_request_alone_and_beside_others(dtype: torch.dtype) -> None:
    check([131_072], heads=8, kv_heads=2, key_dim=64, value_dim=64, dtype=dtype, device="cuda")
    check([3, 40_000, 0, 700], heads=9, kv_heads=3, key_dim=64, value_dim=64, dtype=dtype, device="cuda")


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (9, 3), (32, 8), (32, 1), (64, 2)])
def test_shared_key_heads(heads: int, kv_heads: int) -> None:
    check([3, 200, 5000], heads=heads, kv_heads=kv_heads, key_dim=128, value_dim=128, device="cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_unequal_sides_windows_softcap_and_sinks(dtype: torch.dtype) -> None:
    check([1, 300], key_dim=192, value_dim=128, dtype=dtype, device="cuda")
    check([1, 17, 100, 101, 7000], window=100, dtype=dtype, device="cuda")
    extras = Extras(0.7, 2.0, torch.tensor([0.5, -3.0, 9.0, 0.0]))
    check([1, 40, 300], extras=extras, window=30, dtype=dtype, device="cuda")


def test_keys_are_written_where_they_belong() -> None:
    shape = LayerShape(2, 24, 16, torch.bfloat16, None)
    store = torch.zeros(4, 8, 2, 40, dtype=torch.bfloat16, device="cuda")
    key = torch.randn(2, 3, 24, dtype=torch.bfloat16, device="cuda").transpose(0, 1)
    value = torch.randn(3, 2, 16, dtype=torch.bfloat16, device="cuda")
    slots = torch.tensor([9, 31, 8], device="cuda")
    write(store, shape, key, value, slots)
    flat = store.flatten(0, 1)
    assert torch.equal(flat[slots], torch.cat((key, value), dim=-1))
    flat[slots] = 0
    assert not store.any()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("pairs", ["halves", "neighbours"])
@pytest.mark.parametrize("dim", [16, 64, 80, 128])
def test_far_keys_in_groups(dim: int, pairs: str, dtype: torch.dtype) -> None:
    lengths = [1, 36, 37, 38, 39, 47, 48, 49, 0, 53, 54, 70, 165, 166, 700, 9000]
    groups = [3, 3, 3, 3, 1, 2, 2, 5, 4, 7, 7, 1, 2, 3, 43, 5]
    sizes = {"heads": 8, "key_dim": dim, "value_dim": dim, "rotated": dim // 2 if dim == 64 else dim}
    check_in_groups(lengths, groups, 37, pairs=pairs, dtype=dtype, device="cuda", **sizes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_far_keys_of_a_long_request(dtype: torch.dtype) -> None:
    sizes = {"heads": 8, "key_dim": 64, "value_dim": 64}
    check_in_groups([131_072], [21], 2048, dtype=dtype, device="cuda", **sizes)
    check_in_groups([3, 40_000, 0, 2049, 2048], [5, 5, 1, 3, 3], 2048, dtype=dtype, device="cuda", **sizes)


@pytest.mark.parametrize("pairs", ["halves", "neighbours"])
def test_far_keys_are_written_behind_values(pairs: str) -> None:
    shape = LayerShape(2, 24, 16, torch.float32, None, far_dim=24)
    store = torch.zeros(4, 8, 2, shape.width, device="cuda")
    key, value = torch.randn(3, 2, 24), torch.randn(3, 2, 16)
    slots, inv_freq = torch.tensor([9, 31, 8]), torch.tensor([1.0, 0.1, 0.01])
    by = torch.tensor([[0, 5], [-7, 1], [-300, 9]], dtype=torch.int32)
    tables = turns(by.cuda(), inv_freq.cuda(), pairs)
    write(store, shape, key.cuda(), value.cuda(), slots.cuda(), tables)
    far = torch.stack([turned_by_hand(key[n], int(by[n, 0]), inv_freq, pairs) for n in range(3)]).float()
    flat = store.flatten(0, 1).cpu()
    torch.testing.assert_close(flat[slots], torch.cat((key, value, far), dim=-1), rtol=1e-4, atol=1e-4)
    flat[slots] = 0
    assert not flat.any()
