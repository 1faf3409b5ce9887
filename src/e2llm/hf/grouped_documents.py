"""Attention of training windows in groups where several documents stand in one row: each sees itself alone.

Flows in: what `grouped_training` takes, a group for each document, their lengths. Flows out: the same as if each
document were a row of its own. Documents of similar length are read together, padded behind their ends to a power of
two, so that at most twice as many tokens are read as there are. On a GPU one custom operator stands for all of it, as
a compiled layer must not see how many documents there are. Knows no model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from e2llm.hf.grouped_training import fused, fused_backward, fuses, written_out
from e2llm.hf.operator_gradient import register_gradient
from e2llm.hf.row_tables import sent

# B = batch, H = query heads, G = key-value heads, T = tokens, D = channels, N = documents, n = those of a bucket,
# L = tokens of the longest of them, padded


class Bucket(NamedTuple):
    """Documents that are read together."""

    sources: torch.Tensor
    """(n, L) int64: places in all rows, one row after the other; past a document's end its last token again."""
    beyond: torch.Tensor
    """(n, L) int64: tokens past its end, 0 inside."""
    numbers: torch.Tensor
    """(n,) int64, of the documents."""
    inside: torch.Tensor
    """(M,) int64: places in (n * L) that are of a document."""
    targets: torch.Tensor
    """(M,) int64: theirs in all rows."""


def buckets(lengths: torch.Tensor, device: torch.device) -> Iterator[Bucket]:
    """lengths: (N,) int64 on the host, of documents that stand one after the other."""
    first = lengths.cumsum(0) - lengths
    sizes = torch.tensor([1 << (int(length) - 1).bit_length() for length in lengths])
    for size in sizes.unique().tolist():
        numbers = (sizes == size).nonzero()[:, 0]
        own, places = lengths[numbers, None], torch.arange(int(lengths[numbers].max()))
        index = first[numbers, None] + torch.minimum(places, own - 1)
        inside = (places < own).reshape(-1).nonzero()[:, 0]
        found = (index, (places - own + 1).clamp(min=0), numbers, inside, index.reshape(-1)[inside])
        yield Bucket(*(sent(x, device) for x in found))


def grouped_documents(
    query: torch.Tensor,
    far_query: torch.Tensor,
    key: torch.Tensor,
    far_key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    groups: torch.Tensor,
    segments: torch.Tensor,
    bias: torch.Tensor,
    lengths: torch.Tensor,
    leading: int,
    neighbours: int,
    scale: float,
) -> torch.Tensor:
    """`grouped_training` of each document alone -> (B, H, T, V).

    groups: (N,) integers, one a document. lengths: (N,) int64 on the host, documents in the order of rows; all other
    arguments as there, positions growing inside each document. Raises ValueError where lengths do not fill the rows.
    """
    given = (query, far_query, key, far_key, value, positions, groups, segments, bias)
    if fuses(query):
        out: torch.Tensor = fused_documents(*given, lengths, leading, neighbours, scale)[0]
        return out
    return _written_out(lengths, leading, neighbours, scale, *given)


@torch.compiler.disable
def _written_out(
    lengths: torch.Tensor, leading: int, neighbours: int, scale: float, *given: torch.Tensor
) -> torch.Tensor:
    """By PyTorch's own operators. Outside of layers that are compiled: lengths change."""
    _check(given[0], given[6], lengths)
    batch, heads, tokens, _ = given[0].shape
    flat = given[4].new_zeros(batch * tokens, heads, given[4].shape[-1])
    for bucket in buckets(lengths, flat.device):
        query, far_query, key, far_key, value, *rows = _of(bucket, *given)
        positions, groups, segments, bias = rows
        found = written_out(
            *(query, far_query, key, far_key, value, positions, groups, segments, bias, leading, neighbours, scale)
        )
        flat = flat.index_copy(0, bucket.targets, _inside(bucket, found))
    return _in_rows(flat, batch)


def _check(query: torch.Tensor, groups: torch.Tensor, lengths: torch.Tensor) -> None:
    tokens = query.shape[0] * query.shape[2]
    if int(lengths.sum()) != tokens or len(groups) != len(lengths):
        raise ValueError(
            f"grouped documents: {len(lengths)} of together {int(lengths.sum())} tokens and {len(groups)} groups; "
            f"the rows hold {tokens} tokens"
        )


def _of(bucket: Bucket, *given: torch.Tensor) -> list[Any]:
    """The nine arguments of `grouped_training` of a bucket's documents, as its rows."""
    *heads, positions, groups, segments, bias = given
    rows = positions.reshape(-1)[bucket.sources] + bucket.beyond, groups[bucket.numbers]
    return [
        *(_taken(x, bucket) for x in heads),
        *rows,
        *(x.reshape(-1)[bucket.sources] for x in (segments, bias)),
    ]


def _taken(x: torch.Tensor, bucket: Bucket) -> torch.Tensor:
    """(B, H, T, D) -> (n, H, L, D)."""
    return x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3])[bucket.sources].transpose(1, 2)


def _inside(bucket: Bucket, found: torch.Tensor) -> torch.Tensor:
    """(n, H, L, D) -> (M, H, D) of what is of a document."""
    return found.transpose(1, 2).flatten(0, 1)[bucket.inside]


def _in_rows(flat: torch.Tensor, batch: int) -> torch.Tensor:
    """(B * T, H, D) -> (B, H, T, D)."""
    return flat.unflatten(0, (batch, -1)).transpose(1, 2)


def _put(flat: torch.Tensor, bucket: Bucket, found: torch.Tensor) -> None:
    """(n, H, L, D) to its places in (B * T, H, D)."""
    flat.index_copy_(0, bucket.targets, _inside(bucket, found))


@torch.library.custom_op("e2llm::grouped_documents", mutates_args=())
def fused_documents(
    query: torch.Tensor,
    far_query: torch.Tensor,
    key: torch.Tensor,
    far_key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    groups: torch.Tensor,
    segments: torch.Tensor,
    bias: torch.Tensor,
    lengths: torch.Tensor,
    leading: int,
    neighbours: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`grouped_documents` by kernels, and (B, H, T, 1) float32 logarithms of the sums of weights, in bits."""
    _check(query, groups, lengths)
    batch, heads, tokens, _ = query.shape
    out = value.new_empty(batch * tokens, heads, value.shape[-1])
    log_sums = query.new_empty(batch * tokens, heads, 1, dtype=torch.float32)
    given = (query, far_query, key, far_key, value, positions, groups, segments, bias)
    for bucket in buckets(lengths, query.device):
        found, sums = fused(*_of(bucket, *given), leading, neighbours, scale)
        _put(out, bucket, found)
        _put(log_sums, bucket, sums[..., None])
    return _in_rows(out, batch), _in_rows(log_sums, batch)


@torch.library.custom_op("e2llm::grouped_documents_backward", mutates_args=())
def fused_documents_backward(
    query: torch.Tensor,
    far_query: torch.Tensor,
    key: torch.Tensor,
    far_key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    groups: torch.Tensor,
    segments: torch.Tensor,
    bias: torch.Tensor,
    lengths: torch.Tensor,
    leading: int,
    neighbours: int,
    scale: float,
    out: torch.Tensor,
    log_sums: torch.Tensor,
    out_gradient: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, far_query, key, far_key and value."""
    given = (query, far_query, key, far_key, value, positions, groups, segments, bias)
    found = [x.new_empty(x.shape[0] * x.shape[2], x.shape[1], x.shape[3]) for x in given[:5]]
    for bucket in buckets(lengths, query.device):
        sums = _taken(log_sums, bucket)[..., 0].contiguous()
        # What stands past a document's end is its last token again, which must not count twice.
        back = _taken(out_gradient, bucket).masked_fill((bucket.beyond > 0)[:, None, :, None], 0.0)
        rest = (leading, neighbours, scale, _taken(out, bucket), sums, back)
        for flat, part in zip(found, fused_backward(*_of(bucket, *given), *rest), strict=True):
            _put(flat, bucket, part)
    of_query, of_far_query, of_key, of_far_key, of_value = (_in_rows(x, query.shape[0]) for x in found)
    return of_query, of_far_query, of_key, of_far_key, of_value


def _fake(query: torch.Tensor, *others: Any) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, tokens, _ = query.shape
    value = others[3]
    flat = value.new_empty(batch * tokens, heads, value.shape[-1])
    return _in_rows(flat, batch), _in_rows(flat.new_empty(batch * tokens, heads, 1, dtype=torch.float32), batch)


fused_documents.register_fake(_fake)
fused_documents_backward.register_fake(
    lambda *given: tuple(
        _in_rows(x.new_empty(x.shape[0] * x.shape[2], x.shape[1], x.shape[3]), x.shape[0]) for x in given[:5]
    )
)
register_gradient(fused_documents, fused_documents_backward, 10)
