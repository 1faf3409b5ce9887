"""The kernels compile for a Hopper GPU, on a machine without one: what the code is made of, not how fast it is."""

from __future__ import annotations

from typing import Any

import pytest
from interpreted import INTERPRETED

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")

TENSORS = "query store part stat out key value sinks"
INDICES = {"tables": "*i32", "row_of": "*i32", "length_of": "*i32", "items": "*i32", "item_of": "*i32"}
INDICES |= {"count_of": "*i32", "slots": "*i64", "sources": "*i64", "targets": "*i64", "old": "*fp32", "new": "*fp32"}
INDICES |= {"far_of": "*i32", "turns": "*fp32"}
FLOATS = {"scaling", "softcap", "ratio"}


def compiled(name: str, dtype: str, constants: dict[str, Any], **options: int) -> Any:
    """One kernel for compute capability 9.0; pointers and strides are multiples of sixteen, as in an engine."""
    from triton import compile as triton_compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from e2llm.hf import paged_kernels

    kernel = getattr(paged_kernels, name)
    types = INDICES | {tensor: f"*{dtype}" for tensor in TENSORS.split()} | {"part": "*fp32", "stat": "*fp32"}
    names = kernel.arg_names
    signature, values, attributes = {}, {}, {}
    for place, argument in enumerate(names):
        if argument in constants:
            signature[argument], values[(place,)] = "constexpr", constants[argument]
            continue
        signature[argument] = types.get(argument, "fp32" if argument in FLOATS else "i32")
        if signature[argument].startswith("*") or argument.endswith(("_stride", "_n", "_h", "_g")):
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, values, attributes)
    return triton_compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": True} | options)


NO_GROUPS = {"GROUPED": False, "PAIRS": 1, "INTERLEAVED": False}
GROUPS = [NO_GROUPS, {"GROUPED": True, "PAIRS": 32, "INTERLEAVED": False}]
GROUPS += [{"GROUPED": True, "PAIRS": 16, "INTERLEAVED": True}]


@pytest.mark.parametrize("groups", GROUPS, ids=["each at its place", "in groups", "in groups, interleaved"])
@pytest.mark.parametrize(("dtype", "dim", "keys"), [("bf16", 64, 64), ("fp16", 128, 64), ("fp32", 128, 32)])
def test_attention_of_pieces(dtype: str, dim: int, keys: int, groups: dict[str, Any]) -> None:
    sizes = {"H": 32, "R": 4, "S": 16, "KEY_DIM": dim, "VALUE_DIM": dim, "ROWS": 16, "KEYS": keys, "WIDEN": False}
    blocks = {"KEY_BLOCK": dim, "VALUE_BLOCK": dim, "CAPPED": False, "WINDOWED": False}
    found = compiled("attend_items", dtype, sizes | blocks | groups, num_warps=4, num_stages=3)
    text = found.asm["ptx"]
    assert found.metadata.shared <= 64 * 1024, "three programs at least share a multiprocessor"
    assert "cp.async.cg.shared.global" in text, "keys and values are copied sixteen bytes at a time, ahead of their use"
    assert ("mma.sync" in text) == (dtype != "fp32"), "float32 is multiplied as float32"


def test_the_others() -> None:
    sizes: dict[str, Any] = {"H": 32, "VALUE_DIM": 64, "ITEMS": 16, "VALUE_BLOCK": 64, "HAS_SINKS": True}
    assert compiled("combine_items", "bf16", sizes)
    sizes = {"KEY_DIM": 80, "VALUE_DIM": 80, "KEY_BLOCK": 128, "VALUE_BLOCK": 128}
    for groups in GROUPS:
        assert compiled("write_keys", "bf16", sizes | groups)
    sizes = {"G": 8, "S": 16, "WIDTH": 128, "PAIRS": 32, "FIRST": 0, "INTERLEAVED": False}
    turned = compiled(
        "turn_pages", "bf16", sizes | {"HEADS_BLOCK": 8, "PAIRS_BLOCK": 32, "WIDTH_BLOCK": 128}, enable_fp_fusion=False
    )
    assert "cos.approx" not in turned.asm["ptx"], "angles reach 100,000 radians: the fast cosine is wrong there"
