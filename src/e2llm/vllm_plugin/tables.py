"""Rotary tables of all scales of an engine, one after another, and which of them each token of a batch reads.

Flows in: a `Scaling`, the sizes of a rotary embedding. Flows out: tensors in vLLM's layout. The frequencies are those
of `positions.frequencies`, so a table holds what transformers' static scaling computes. Knows no vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from e2llm.positions.frequencies import frequencies
from e2llm.positions.rope import Rope
from e2llm.vllm_plugin.scaling import Scaling

# D = rotary_dim


def unscaled_rope(rotary_dim: int, base: float, native_window: int) -> Rope:
    """The rotary embedding base ** (-2j/D), computed on the CPU in transformers' order of operations."""
    with torch.device("cpu"):
        exponents = torch.arange(0, rotary_dim, 2, dtype=torch.int64).to(torch.float32) / rotary_dim
        inv_freq = 1.0 / (base**exponents)
    return Rope(rotary_dim=rotary_dim, base=base, native_window=native_window, inv_freq=tuple(inv_freq.tolist()))


def rotary_tables(rope: Rope, scaling: Scaling, dtype: torch.dtype) -> torch.Tensor:
    """(scaling.num_rows, D) `dtype`, CPU: cos of D/2 channels, then sin, times the attention scale; row
    `scaling.row_starts[g] + m` is position m at scale g. Angles are float32.

    Raises ValueError for a method that cannot be had from `rope`.
    """
    tables = []
    with torch.device("cpu"):  # vLLM builds models on the GPU, whose powers and cosines differ in the last bit
        for scale in scaling.scales:
            found = frequencies(rope, scaling.method, scale, scaling.slope)
            positions = torch.arange(scaling.rows(scale), dtype=torch.int64).to(torch.float32)
            angles = positions[:, None] * found.inv_freq
            table = torch.cat((angles.cos(), angles.sin()), dim=-1) * found.attention_scale
            tables.append(table.to(dtype))
        return torch.cat(tables)


def write_row_starts(
    targets: Sequence[torch.Tensor], starts: np.ndarray, counts: np.ndarray, num_padded_tokens: int
) -> None:
    """Fill each target's first `num_padded_tokens` entries: request i's `starts[i]`, `counts[i]` times over, in batch
    order, then 0 for padding. targets: (most tokens of a step,) int64 each, written in place: CUDA graphs keep their
    addresses."""
    values = torch.from_numpy(np.repeat(starts, counts))
    for target in targets:
        target[: len(values)].copy_(values, non_blocking=True)
        target[len(values) : num_padded_tokens].zero_()


def spread_row_starts(targets: Sequence[torch.Tensor], request_row_starts: torch.Tensor, batch: Any) -> None:
    """Write each token's first table row into `targets`, in place and without waiting for the device.

    request_row_starts: (requests there can be,) int64. batch: vLLM's `InputBatch`, whose `idx_mapping` names the
    request of each place in the batch and whose `query_start_loc` where its tokens begin; both may be longer, padded.
    """
    count, tokens = batch.num_reqs, batch.num_tokens
    own = request_row_starts[batch.idx_mapping[:count].long()]
    begins = batch.query_start_loc[: count + 1].long()
    spread = torch.repeat_interleave(own, begins[1:] - begins[:-1], output_size=tokens)
    for target in targets:
        target[:tokens].copy_(spread)
        target[tokens : batch.num_tokens_after_padding].zero_()
