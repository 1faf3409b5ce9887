"""Attention of training windows whose far keys are told apart by groups only: fused on a GPU, else written out.

Flows in: queries and keys rotated twice, as near and as far ones (Jin et al. 2024, arXiv 2401.01325, Sect. 3), and for
each row its positions, group and segments. Flows out: what each query attends to, with gradients. On a GPU Triton
kernels (`grouped_kernels.py`, `grouped_gradient_kernels.py`) never hold scores (Dao 2023, arXiv 2307.08691), and one
custom operator stands for them all, so that a compiled layer goes around it in one piece. Knows no model.
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from e2llm.hf.operator_gradient import register_gradient
from e2llm.hf.paged_decode import device_of, tile_side

# B = batch, H = query heads, G = key-value heads, T = tokens, D = channels, V = channels of values

MOST_SCORES = 2**26
"""Held at once where they are written out, without those that autograd keeps."""
MOST_CHANNELS = 256
CHUNK = 1024  # tokens that a search for segments reads at once


class Tile(NamedTuple):
    """How one kernel cuts its work."""

    queries: int
    keys: int
    warps: int
    stages: int


KERNELS = ("attend", "back_to_queries", "back_to_keys")
CHOSEN: dict[str, Tile] = {}
"""By kernel: tiles in the place of `tile_of`'s, for tests and measurements."""
_TRITON = importlib.util.find_spec("triton") is not None
_ROOM = 200 * 1024  # bytes of shared memory that a program of large tiles may need
_LARGE = {
    (2, 64): (Tile(128, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 128, 8, 2)),
    (2, 128): (Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(32, 128, 8, 2)),
    (2, 256): (Tile(64, 32, 8, 2), Tile(64, 32, 8, 1), Tile(32, 64, 8, 2)),
    (4, 64): (Tile(64, 32, 4, 2), Tile(64, 32, 8, 2), Tile(32, 64, 4, 2)),
    (4, 128): (Tile(32, 32, 4, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
    (4, 256): (Tile(16, 16, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1)),
}
"""By bytes of a number and channels at most, in the order of `KERNELS`."""
_SMALL = {
    (2, 64): (Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    (2, 128): (Tile(64, 32, 4, 2), Tile(64, 32, 4, 1), Tile(32, 64, 4, 1)),
    (2, 256): (Tile(32, 32, 4, 1), Tile(32, 16, 4, 1), Tile(16, 32, 4, 1)),
    (4, 64): (Tile(32, 32, 4, 2), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
    (4, 128): (Tile(32, 16, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1)),
    (4, 256): (Tile(16, 16, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1)),
}


def tile_of(kernel: str, block: int, itemsize: int, room: int) -> Tile:
    """The tile of a `kernel` for heads of `block` channels (a power of two, at most 256) of so many bytes each, where
    a program may have `room` bytes of shared memory."""
    if kernel in CHOSEN:
        return CHOSEN[kernel]
    table = _LARGE if room > _ROOM else _SMALL
    return table[itemsize, max(block, 64)][KERNELS.index(kernel)]


def grouped_training(
    query: torch.Tensor,
    far_query: torch.Tensor,
    key: torch.Tensor,
    far_key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    groups: torch.Tensor,
    segments: torch.Tensor,
    bias: torch.Tensor,
    leading: int,
    neighbours: int,
    scale: float,
) -> torch.Tensor:
    """Softmax over each row's keys up to the query itself, times values -> (B, H, T, V) of the values' dtype.

    A score is query · key, or far_query · far_key where the group is more than 1 and the key `neighbours` positions or
    more before the query; times `scale`, less the query's `bias` where the key is of its segment or one of the first
    `leading` tokens.

    query, far_query: (B, H, T, D) of one floating dtype; key, far_key: (B, G, T, D), value: (B, G, T, V), G a divisor
    of H; views are welcome. positions: (B, T) int64 or int32, growing along each row (not checked). groups: (B,) of
    integers. segments: (B, T) of integers of at most 32 bits. bias: (B, T) float32. Products of bfloat16 and float16
    are summed in float32. There are gradients for the first five, once, and of their dtypes.

    Raises ValueError for shapes, dtypes or sizes that do not fit, and on a GPU without Triton.
    """
    _check(query, far_query, key, far_key, value)
    _check_rows(query, positions, groups, segments, bias)
    if leading < 0 or neighbours < 1 or not scale > 0:
        raise ValueError(
            f"grouped training: leading = {leading}, neighbours = {neighbours}, scale = {scale:g}; use at least 0, "
            "at least 1 and more than 0"
        )
    rest = (positions, groups, segments, bias, leading, neighbours, float(scale))
    if not fuses(query):
        return written_out(query, far_query, key, far_key, value, *rest)
    out: torch.Tensor = fused(query, far_query, key, far_key, value, *rest)[0]
    return out


def written_out(
    query: torch.Tensor,
    far_query: torch.Tensor,
    key: torch.Tensor,
    far_key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    groups: torch.Tensor,
    segments: torch.Tensor,
    bias: torch.Tensor,
    leading: int,
    neighbours: int,
    scale: float,
) -> torch.Tensor:
    """`grouped_training` by PyTorch's own operators, some queries at a time; in float32, or float64 if the values are.
    Also the reference of the kernels."""
    batch, heads, tokens, _ = query.shape
    kind = torch.promote_types(value.dtype, torch.float32)
    query, far_query, key, far_key = (x.to(kind) for x in (query, far_query, key, far_key))
    values, order = value.to(kind), torch.arange(tokens, device=query.device)
    several = (groups > 1)[:, None, None]
    size = max(1, MOST_SCORES // max(batch * heads * tokens, 1))
    found = []
    for first in range(0, tokens, size):
        end = min(first + size, tokens)
        own = slice(first, end)
        distance = positions[:, own, None] - positions[:, None, :end]
        is_far = ((distance >= neighbours) & several)[:, None]
        near = _products(query[:, :, own], key[:, :, :end].transpose(-1, -2))
        far = _products(far_query[:, :, own], far_key[:, :, :end].transpose(-1, -2))
        same = (segments[:, own, None] == segments[:, None, :end]) | (order[:end] < leading)
        scores = torch.where(is_far, far, near) * scale - (bias[:, own, None] * same)[:, None]
        hidden = order[:end] > order[own, None]
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        found.append(_products(weights, values[:, :, :end]))
    return torch.cat(found, 2).to(value.dtype)


def _products(rows: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
    """(B, H, N, K) @ (B, G, K, M) -> (B, H, N, M), each of the G with its H / G heads, none of them copied."""
    found = rows.reshape(rows.shape[0], shared.shape[1], -1, rows.shape[-1]) @ shared
    return found.view(*rows.shape[:3], -1)


def fuses(query: torch.Tensor) -> bool:
    if not query.is_cuda or query.dtype == torch.float64:
        return False
    if not _TRITON:
        raise ValueError("grouped training on a GPU needs Triton, which is not there; pip install triton")
    return True


def _check(
    query: torch.Tensor, far_query: torch.Tensor, key: torch.Tensor, far_key: torch.Tensor, value: torch.Tensor
) -> None:
    heads, kv_heads = query.shape[1], key.shape[1]
    if far_query.shape != query.shape or far_key.shape != key.shape or value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"grouped training: query {tuple(query.shape)} and {tuple(far_query.shape)}, key {tuple(key.shape)} and "
            f"{tuple(far_key.shape)}, value {tuple(value.shape)}: far ones need the shape of near ones, values that "
            "of keys but for the channels"
        )
    if (key.shape[0], *key.shape[2:]) != (query.shape[0], *query.shape[2:]) or not kv_heads or heads % kv_heads:
        raise ValueError(
            f"grouped training: query {tuple(query.shape)}, key {tuple(key.shape)}: rows, tokens and channels must be "
            "the same, and heads of keys a divisor of those of queries"
        )
    if max(query.shape[-1], value.shape[-1]) > MOST_CHANNELS:
        raise ValueError(
            f"grouped training: heads of {query.shape[-1]} channels and values of {value.shape[-1]}; use at most "
            f"{MOST_CHANNELS}"
        )
    if not query.is_floating_point() or any(x.dtype != query.dtype for x in (far_query, key, far_key, value)):
        dtypes = ", ".join(str(x.dtype) for x in (query, far_query, key, far_key, value))
        raise ValueError(f"grouped training: {dtypes}: use one floating dtype")


def _check_rows(
    query: torch.Tensor, positions: torch.Tensor, groups: torch.Tensor, segments: torch.Tensor, bias: torch.Tensor
) -> None:
    rows = (query.shape[0], query.shape[2])
    if any(tuple(x.shape) != rows for x in (positions, segments, bias)) or tuple(groups.shape) != rows[:1]:
        raise ValueError(
            f"grouped training: positions {tuple(positions.shape)}, groups {tuple(groups.shape)}, segments "
            f"{tuple(segments.shape)}, bias {tuple(bias.shape)}: use {rows} and {rows[:1]} for groups"
        )


@dataclass(frozen=True)
class _Rows:
    """What kernels want to know about the rows."""

    positions: torch.Tensor
    groups: torch.Tensor
    segments: torch.Tensor
    bias: torch.Tensor
    """(B, T) float32, before scores are scaled."""
    leading: int
    neighbours: int
    scale: float

    @classmethod
    def of(
        cls,
        positions: torch.Tensor,
        groups: torch.Tensor,
        segments: torch.Tensor,
        bias: torch.Tensor,
        leading: int,
        neighbours: int,
        scale: float,
    ) -> _Rows:
        weighed = (bias.float() / scale).contiguous()
        segments = segments.to(torch.int32).contiguous()
        return cls(positions.contiguous(), groups.contiguous(), segments, weighed, leading, neighbours, scale)

    def bounds(self, block: int, keys: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Turns (B, T) and bounds (B, blocks, 4), int32, of `find_bounds`."""
        from e2llm.hf import grouped_kernels as kernels

        batch, tokens = self.positions.shape
        blocks = -(-tokens // block)
        turns = torch.empty(batch, tokens, dtype=torch.int32, device=self.positions.device)
        bounds = torch.empty(batch, blocks, 4, dtype=torch.int32, device=self.positions.device)
        kernels.find_bounds[(blocks, batch)](
            *(self.positions, self.groups, self.segments, self.bias, turns, bounds),
            *(tokens, self.leading, self.neighbours, tokens.bit_length()),
            BLOCK=block,
            CHUNK=CHUNK,
            KEYS=keys,
        )
        return turns, bounds


def _launch(kernel: str, query: torch.Tensor, value: torch.Tensor) -> dict[str, Any]:
    """Constants and options of one of the three kernels."""
    width, value_width = query.shape[-1], value.shape[-1]
    block, value_block = tile_side(width, 16), tile_side(value_width, 16)
    interpreted = query.device.type == "cpu"
    device = None if interpreted else torch.cuda.get_device_properties(query.device)
    room = getattr(device, "shared_memory_per_block_optin", 0)
    tile = tile_of(kernel, max(block, value_block), query.element_size(), room)
    return {
        "QUERIES": tile.queries,
        "KEYS": tile.keys,
        "DIM": width,
        "VALUE_DIM": value_width,
        "BLOCK": block,
        "VALUE_BLOCK": value_block,
        "WIDEN": interpreted and query.dtype == torch.bfloat16,
        "PRECISION": "tf32x3" if query.dtype == torch.float32 and not interpreted else "ieee",
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


@torch.library.custom_op("e2llm::grouped_training", mutates_args=())
def fused(
    query: torch.Tensor,
    far_query: torch.Tensor,
    key: torch.Tensor,
    far_key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    groups: torch.Tensor,
    segments: torch.Tensor,
    bias: torch.Tensor,
    leading: int,
    neighbours: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`grouped_training` by kernels, and (B, H, T) float32 logarithms of the sums of weights, in bits."""
    from e2llm.hf import grouped_kernels as kernels

    rows = _Rows.of(positions, groups, segments, bias, leading, neighbours, scale)
    query, far_query, key, far_key, value = (_last_dense(x) for x in (query, far_query, key, far_key, value))
    out, log_sums = _made(query, value)
    launch = _launch("attend", query, value)
    batch, heads, tokens, _ = query.shape
    with device_of(query):
        turns, bounds = rows.bounds(launch["QUERIES"], keys=False)
        kernels.attend[(bounds.shape[1], batch * heads)](
            *(query, far_query, key, far_key, value, out, log_sums, rows.segments, rows.bias, turns, bounds),
            *_strides(query, far_query, key, far_key, value, out),
            *(tokens, leading, scale * math.log2(math.e)),
            H=heads,
            R=heads // key.shape[1],
            **launch,
        )
    return out, log_sums


@torch.library.custom_op("e2llm::grouped_training_backward", mutates_args=())
def fused_backward(
    query: torch.Tensor,
    far_query: torch.Tensor,
    key: torch.Tensor,
    far_key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    groups: torch.Tensor,
    segments: torch.Tensor,
    bias: torch.Tensor,
    leading: int,
    neighbours: int,
    scale: float,
    out: torch.Tensor,
    log_sums: torch.Tensor,
    out_gradient: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, far_query, key, far_key and value."""
    from e2llm.hf import grouped_gradient_kernels as kernels

    rows = _Rows.of(positions, groups, segments, bias, leading, neighbours, scale)
    given = (query, far_query, key, far_key, value)
    of_query, of_far_query, of_key, of_far_key, of_value = (_empty(x) for x in given)
    dense = [_last_dense(x) for x in given]
    out, out_gradient = _last_dense(out), _last_dense(out_gradient)
    deltas = torch.empty_like(log_sums)
    batch, heads, tokens, _ = query.shape
    kv_heads = key.shape[1]
    sizes = (tokens, leading, scale * math.log2(math.e), scale)
    shared = heads // kv_heads
    with device_of(query):
        launch = _launch("back_to_queries", query, value)
        turns, bounds = rows.bounds(launch["QUERIES"], keys=False)
        kernels.back_to_queries[(bounds.shape[1], batch * heads)](
            *(*dense, out, out_gradient, of_query, of_far_query, log_sums, deltas),
            *(rows.segments, rows.bias, turns, bounds),
            *_strides(*dense, out, out_gradient, of_query, of_far_query),
            *sizes,
            H=heads,
            R=shared,
            **launch,
        )
        launch = _launch("back_to_keys", query, value)
        turns, bounds = rows.bounds(launch["KEYS"], keys=True)
        kernels.back_to_keys[(bounds.shape[1], batch * kv_heads)](
            *(*dense, out_gradient, of_key, of_far_key, of_value, log_sums, deltas),
            *(rows.segments, rows.bias, turns, bounds),
            *_strides(*dense, out_gradient, of_key, of_far_key, of_value),
            *sizes,
            G=kv_heads,
            R=shared,
            **launch,
        )
    return of_query, of_far_query, of_key, of_far_key, of_value


fused.register_fake(lambda query, *others: _made(query, others[3]))
fused_backward.register_fake(lambda *given: tuple(_empty(x) for x in given[:5]))
register_gradient(fused, fused_backward, 9)


def _made(query: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for what `fused` returns; tokens outside heads in memory, as the layer after it wants them."""
    batch, heads, tokens, _ = query.shape
    out = value.new_empty(batch, tokens, heads, value.shape[-1]).transpose(1, 2)
    return out, query.new_empty(batch, heads, tokens, dtype=torch.float32)


def _empty(x: torch.Tensor) -> torch.Tensor:
    """Room for the gradient of `x`, in its order where kernels can write that."""
    found = torch.empty_like(x)
    return found if found.stride(-1) == 1 else torch.empty_like(x, memory_format=torch.contiguous_format)


def _last_dense(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(*tensors: torch.Tensor) -> list[int]:
    """Of rows, heads and tokens of each."""
    return [stride for x in tensors for stride in x.stride()[:3]]
