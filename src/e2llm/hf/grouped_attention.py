"""SelfExtend's attention out of causal squares, by kernels that write no scores; what is joined are their sums.

Flows in: queries and keys of a prompt, rotated to their own places and to their groups'. Flows out: the attention of
both. Keys nearer than `neighbours` to a query are a band along the diagonal, cut into blocks of that side: of its own
block a query sees what is causal, of the one before it what is causal when both are read backwards. Keys beyond are all
causal again, from a place earlier. Each part comes with the logarithm of its sum of exponentials, by which parts are
weighed (as FlashAttention joins its own blocks: Dao et al. 2022, arXiv 2205.14135, Sect. 3.1).
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

# B = batch, H = heads, Q = queries, K = keys, D = head dim, W = neighbours

Part = tuple[torch.Tensor, torch.Tensor]
"""Answers (B, H, Q, D) and the logarithms of their sums of exponentials (B, H, Q), float32."""


def has_kernels(query: torch.Tensor) -> bool:
    """Whether `query` (…, D) is of a type and size that the kernels take."""
    if query.device.type == "cuda":
        return query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] % 8 == 0 and query.shape[-1] <= 256
    return query.device.type == "cpu"


def can_group(queries: int, keys: int, neighbours: int) -> bool:
    """Whether blocks fit: the keys before the queries are none, or enough for the first block's band."""
    return queries > 1 and (keys == queries or keys - queries >= neighbours)


def grouped_attention(
    query: torch.Tensor,
    far_query: torch.Tensor,
    key: torch.Tensor,
    far_key: torch.Tensor,
    value: torch.Tensor,
    neighbours: int,
    scale: float,
) -> torch.Tensor:
    """Queries (B, H, Q, D), the last Q of K places, over keys and values (B, H, K, D) -> (B, H, Q, D) of value's type.

    A key nearer than `neighbours` counts as `query` · `key`, another as `far_query` · `far_key`. For what `has_kernels`
    and `can_group` allow.
    """
    found = _joined(_own_blocks(query, key, value, neighbours, scale), 0, None)
    found = _joined(found, *_blocks_before(query, key, value, neighbours, scale))
    for first, part in _far(far_query, far_key, value, neighbours, scale):
        found = _joined(found, first, part)
    return found[0].to(value.dtype)


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, *, causal: bool) -> Part:
    """(B, H, Q, D) over (B, H, K, D), with as many queries as keys where it is causal."""
    query, key, value = (x.contiguous() for x in (query, key, value))
    if query.device.type == "cpu":
        op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    else:
        op = torch.ops.aten._scaled_dot_product_flash_attention
    answer, sums = op(query, key, value, 0.0, causal, scale=scale)[:2]
    return answer.float(), sums.float()


def _joined(found: Part, first: int, part: Part | None) -> Part:
    """`found` with a `part` for its queries from `first` on."""
    if part is None:
        return found
    (answers, sums), (answer, more) = found, part
    rows = slice(first, first + more.shape[-1])
    both = torch.logaddexp(sums[..., rows], more)
    old, new = (sums[..., rows] - both).exp(), (more - both).exp()
    answers[..., rows, :] = answers[..., rows, :] * old[..., None] + answer * new[..., None]
    sums[..., rows] = both
    return answers, sums


def _blocks(x: torch.Tensor, side: int) -> torch.Tensor:
    """(B, H, T, D) -> (B, H, T / side, side, D), zeros at the end where T is no multiple."""
    return pad(x, (0, 0, 0, -x.shape[2] % side)).unflatten(2, (-1, side))


def _one_after_another(x: torch.Tensor, heads: int, tokens: int) -> torch.Tensor:
    """(B, H · blocks, side, …) -> the first `tokens` of (B, H, blocks · side, …)."""
    return x.unflatten(1, (heads, -1)).flatten(2, 3)[:, :, :tokens]


def _own_blocks(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, side: int, scale: float) -> Part:
    queries = query.shape[2]
    own, keys, values = (_blocks(x[:, :, -queries:], side).flatten(1, 2) for x in (query, key, value))
    answer, sums = attend(own, keys, values, scale, causal=True)
    return _one_after_another(answer, query.shape[1], queries), _one_after_another(sums, query.shape[1], queries)


def _blocks_before(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, side: int, scale: float
) -> tuple[int, Part | None]:
    """(First query that has a block before its own, what these see of them)."""
    queries, before = query.shape[2], key.shape[2] - query.shape[2]
    first = 0 if before else side  # with nothing before them, the first block's queries have none
    if side == 1 or queries <= first:
        return first, None
    later = _blocks(query[:, :, first:], side)
    start = before - side if before else 0
    count = later.shape[2]
    earlier = (_blocks(x[:, :, start:], side)[:, :, :count, 1:] for x in (key, value))
    # Read backwards, the query before its block's last is the first, and sees the last key before the block.
    rows, keys, values = (x.flip(3).flatten(1, 2) for x in (later[:, :, :, :-1], *earlier))
    answer, sums = attend(rows, keys, values, scale, causal=True)
    answer, sums = pad(answer.flip(2), (0, 0, 0, 1)), pad(sums.flip(2), (0, 1), value=float("-inf"))
    heads, left = query.shape[1], queries - first
    return first, (_one_after_another(answer, heads, left), _one_after_another(sums, heads, left))


def _far(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, neighbours: int, scale: float
) -> list[tuple[int, Part]]:
    """(First query, what it and those after it see of far keys), twice where some keys are far from all queries."""
    queries, before = query.shape[2], key.shape[2] - query.shape[2]
    first = max(0, neighbours - before)
    if first >= queries:
        return []
    rows, seen = query[:, :, first:], before + first - neighbours
    square = slice(seen, seen + queries - first)
    found = [(first, attend(rows, key[:, :, square], value[:, :, square], scale, causal=True))]
    if seen:
        found.append((first, attend(rows, key[:, :, :seen], value[:, :, :seen], scale, causal=False)))
    return found
