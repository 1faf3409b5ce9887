"""A batch of vLLM's, read in groups: what its block tables and lengths make of `hf.packed`'s step over pages.

Flows in: vLLM's view of a layer's cache, a batch's block tables and lengths, and the groups of its requests, which the
model runner tells before each forward pass. Flows out: a `PackedStep`, which writes keys, values and far keys into
vLLM's own pages and answers every layer's attention, as in e2llm's own engine. Imports no vLLM.
"""

from __future__ import annotations

import numpy as np
import torch

from e2llm.hf.group_tables import Grouping
from e2llm.hf.packed import NULL_PAGE, KeyValuePages, PackedStep, Piece
from e2llm.hf.paged_decode import BlockTables

# R = requests of a batch, B = pages, S = tokens of a page, G = key-value heads, D = head dim


class NextBatch:
    """Groups of the batch that comes next: told by the model runner, taken once, by the attention's first layer."""

    def __init__(self) -> None:
        self._told: tuple[np.ndarray, Grouping] | None = None

    def tell(self, groups: np.ndarray, grouping: Grouping) -> None:
        """groups: (R,) int64, in batch order."""
        self._told = groups, grouping

    def take(self, num_requests: int) -> tuple[np.ndarray, Grouping]:
        """What was told. Raises RuntimeError where nothing was, or of another batch: no groups are guessed."""
        told, self._told = self._told, None
        if told is None or len(told[0]) != num_requests:
            count = "nothing" if told is None else f"{len(told[0])} requests"
            raise RuntimeError(f"a batch of {num_requests} requests reached the attention, which was told of {count}")
        return told


NEXT_BATCH = NextBatch()
"""Of this process, which runs one model."""


def pages_of(cache: torch.Tensor) -> torch.Tensor:
    """vLLM's view (B, G, S, 3 D) of a layer's cache as (B, S, G, 3 D), the same memory: key, value and far key of a
    head side by side. Raises RuntimeError for a cache that lies otherwise, into which nothing could be written."""
    found = cache.transpose(1, 2)
    if not found.is_contiguous():
        raise RuntimeError(
            f"the cache of a layer, {tuple(cache.shape)} with strides {cache.stride()}, does not hold a token's heads "
            "side by side; leave VLLM_KV_CACHE_LAYOUT out"
        )
    return found


def batch_step(
    pages: KeyValuePages,
    block_table: torch.Tensor,
    query_starts: np.ndarray,
    lengths: np.ndarray,
    told: NextBatch,
    *,
    kernels: bool,
) -> PackedStep | None:
    """The step of a batch whose requests each go on with their next tokens, in batch order; None for a batch that vLLM
    makes up when it measures or records, whose answers nobody reads: its requests own no page but the null one, which
    no request ever gets.

    block_table: (R or more, pages) int32 on the device. query_starts: (R + 1,), where each request's tokens begin in
    the row. lengths: (R,), tokens that each will have been read to. `kernels`: leading requests of one
    token are attended by Triton's, over the block table as it lies on the device; the others' keys are gathered, for
    which the table comes to the host, once a step.
    """
    counts = np.diff(query_starts)
    size = pages.page_tokens
    on_host = block_table[: len(counts), : -(-int(lengths.max()) // size)].cpu().numpy().astype(np.int64)
    if not (on_host[:, 0] != NULL_PAGE).any():
        return None
    groups, grouping = told.take(len(counts))
    pieces = [
        Piece(table[: -(-length // size)], length - count, count, group)
        for table, length, count, group in zip(
            on_host, lengths.tolist(), counts.tolist(), groups.tolist(), strict=True
        )
    ]
    if not kernels:
        return PackedStep(pages, pieces, grouping=grouping)
    single = counts == 1
    ahead = len(counts) if single.all() else int(single.argmin())
    return PackedStep(pages, pieces, BlockTables.borrowed(block_table), np.arange(ahead), grouping)
