"""How many pages of keys and values an engine gets: from slots or bytes that are given, or from what is free."""

from __future__ import annotations

import os

import torch

CUDA_SHARE = 0.8
CPU_SHARE = 0.25
CPU_BYTES = 4 * 2**30


def kv_pages(
    token_bytes: int,
    page_tokens: int,
    device: torch.device,
    most_tokens: int,
    *,
    tokens: int | None = None,
    total_bytes: int | None = None,
) -> int:
    """Pages of `page_tokens` slots of `token_bytes` each.

    From `tokens` or `total_bytes`, rounded down to whole pages; with neither a share of the free memory, at most
    `most_tokens` slots. Raises ValueError for both, and for less than one page.
    """
    if tokens is not None and total_bytes is not None:
        raise ValueError(f"kv_tokens = {tokens} and kv_bytes = {total_bytes}: give one of them, or neither")
    if tokens is not None:
        name, given, pages = "kv_tokens", tokens, tokens // page_tokens
    else:
        name, given = "kv_bytes", total_bytes if total_bytes is not None else _free_share(device)
        pages = given // (token_bytes * page_tokens)
        if total_bytes is None:
            pages = min(pages, -(-most_tokens // page_tokens))
    if pages < 1:
        raise ValueError(
            f"{name} = {given}: one page of {page_tokens} tokens takes {page_tokens * token_bytes} bytes; give more"
        )
    return pages


def _free_share(device: torch.device) -> int:
    """Bytes that keys and values may take by default."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * CUDA_SHARE)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(int(free * CPU_SHARE), CPU_BYTES)
