"""The kernels of grouped training windows compile for a Hopper GPU, on a machine without one, with the tiles they get
there."""

from __future__ import annotations

from typing import Any

import pytest
from interpreted import INTERPRETED

from e2llm.hf.grouped_training import KERNELS, tile_of

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")

TYPES = {"positions": "*i64", "groups": "*i64", "segments": "*i32", "bias": "*fp32", "turns": "*i32", "bounds": "*i32"}
TYPES |= {"log_sums": "*fp32", "deltas": "*fp32", "scale": "fp32", "out_scale": "fp32"}
SIZES = {"tokens", "leading", "neighbours", "steps"}
SLOW = [pytest.param(dtype, dim, marks=pytest.mark.slow) for dtype, dim in (("fp16", 128), ("fp32", 64), ("fp32", 128))]
SHARED = 227 * 1024
"""Bytes that a program may have."""


def compiled(name: str, dtype: str, constants: dict[str, Any], **options: int) -> Any:
    """One kernel for compute capability 9.0; pointers and strides are multiples of sixteen, as in a model."""
    from triton import compile as triton_compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from e2llm.hf import grouped_gradient_kernels, grouped_kernels

    kernel = getattr(grouped_kernels, name, None) or getattr(grouped_gradient_kernels, name)
    signature, values, attributes = {}, {}, {}
    for place, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument], values[(place,)] = "constexpr", constants[argument]
            continue
        stride = argument.endswith(("_b", "_h", "_t"))
        signature[argument] = TYPES.get(argument, "i32" if stride or argument in SIZES else f"*{dtype}")
        if stride or signature[argument].startswith("*"):
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, values, attributes)
    return triton_compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": True} | options)


def for_hopper(name: str, dtype: str, dim: int, **more: int) -> Any:
    tile = tile_of(name, dim, 4 if dtype == "fp32" else 2, SHARED)
    heads = {"G": 3} if name == "back_to_keys" else {"H": 9}
    sizes = {"QUERIES": tile.queries, "KEYS": tile.keys, "DIM": dim, "VALUE_DIM": dim, "BLOCK": dim, "VALUE_BLOCK": dim}
    how = {"R": 3, "WIDEN": False, "PRECISION": "tf32x3" if dtype == "fp32" else "ieee"}
    return compiled(name, dtype, heads | sizes | how | more, num_warps=tile.warps, num_stages=tile.stages)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("dtype", "dim"), [("bf16", 64), ("bf16", 256), *SLOW])
def test_tiles_fit(name: str, dtype: str, dim: int) -> None:
    found = for_hopper(name, dtype, dim)
    assert found.metadata.shared <= SHARED
    assert "mma" in found.asm["ptx"]
    if (dtype, dim) == ("bf16", 64):
        assert "wgmma.mma_async" in found.asm["ptx"]
        loops = found.asm["ttgir"].count("scf.for") - 2 * (name == "back_to_keys")
        assert loops == 3 + (name == "back_to_keys"), "one each of near, far and both; both twice for keys"
        assert found.asm["ttgir"].count("ttg.async_copy_global_to_local") >= 4 * loops, "blocks are loaded ahead"


def test_sizes_of_one() -> None:
    """Triton makes constants of them."""
    ones = dict.fromkeys(SIZES, 1)
    for keys in (False, True):
        assert compiled("find_bounds", "bf16", {"BLOCK": 64, "CHUNK": 1024, "KEYS": keys} | ones)
    assert for_hopper("attend", "bf16", 64, tokens=1, leading=1, key_t=1)
