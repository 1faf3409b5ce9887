"""Perplexity of long documents at a window and a scale: summed nats over summed tokens, never a mean of means.

Both protocols score the same tokens at every window, so that rows differ by the context alone. whole: the document's
first max(windows) tokens are cut into windows, each read from scratch in one pass. A token is scored when its index
is no multiple of the smallest window: every scored token has a token before it in the cuts of every window. sliding
(E²-LLM Table 3): windows that end every `stride` tokens; each scores its last `stride` tokens with the full context
to its left, exactly, by a pass of its own (keys kept from an earlier window would have seen tokens that have left
this one).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import pad

from e2llm.evaluate.blocks import Blocks, BlockSums
from e2llm.evaluate.documents import Document
from e2llm.evaluate.logits import TokenScorer
from e2llm.infer import Engine

TOKENS_PER_FORWARD = {"cuda": 32_768, "cpu": 4096}
"""Tokens in one batch of short windows; one window that is longer goes alone."""


@dataclass(frozen=True)
class DocumentLoss:
    """What one document contributes to a corpus perplexity."""

    document: str
    nats: float
    """Sum over the scored tokens."""
    tokens: int
    """Scored tokens."""
    passes: int
    """Windows read."""
    blocks: Blocks = ()
    """The same nats and tokens by contiguous blocks; () of a short document."""


def perplexity(losses: Sequence[DocumentLoss]) -> float:
    """exp(summed nats / summed tokens)."""
    return math.exp(sum(loss.nats for loss in losses) / sum(loss.tokens for loss in losses))


def whole_windows(
    engine: Engine,
    documents: Sequence[Document],
    *,
    window: int,
    scale: float,
    windows: Sequence[int],
    scorer: TokenScorer | None = None,
    first_token: int | None = None,
    tokens_per_forward: int | None = None,
    progress: Callable[[int], None] = lambda tokens: None,
) -> list[DocumentLoss]:
    """Loss of each document's first max(windows) tokens, read in windows of `window` at `scale`.

    `windows` are all windows of the comparison (they fix which tokens are scored); `first_token` replaces the first
    token of every window (a begin-of-text token that the model expects; that token is never scored). `progress` is
    told tokens read.
    """
    length, smallest = max(windows), min(windows)
    _need_tokens(documents, length)
    scorer = scorer or TokenScorer(engine)
    scored = (torch.arange(1, length + 1, device=engine.model.device) % smallest != 0).view(-1, window)[:, : window - 1]
    batch = batch_rows(engine, window, tokens_per_forward)
    sums: list[torch.Tensor] = []
    blocks = [BlockSums(0, length) for _ in documents]
    with engine.at_scale(scale):
        for document, own in zip(documents, blocks, strict=True):
            ids = token_rows(engine, document.tokens[:length].reshape(-1, window), first_token)
            total = torch.zeros((), dtype=torch.float64, device=ids.device)
            start = 0
            for rows, keep in zip(ids.split(batch), scored.split(batch), strict=True):
                nats = torch.where(keep, scorer.nats(rows), 0)
                total += nats.sum(dtype=torch.float64)
                own.add(start, pad(nats, (1, 0)).flatten())
                start += rows.numel()
                progress(rows.numel())
            sums.append(total)
    tokens = length - length // smallest

    def count(low: int, high: int) -> int:
        """Tokens of low … high - 1 that begin no smallest window."""
        return high - low - ((high - 1) // smallest - (low - 1) // smallest)

    return _losses(documents, sums, [own.blocks(count) for own in blocks], tokens=tokens, passes=length // window)


def sliding_windows(
    engine: Engine,
    documents: Sequence[Document],
    *,
    window: int,
    scale: float,
    windows: Sequence[int],
    stride: int = 256,
    max_strides: int | None = None,
    scorer: TokenScorer | None = None,
    first_token: int | None = None,
    tokens_per_forward: int | None = None,
    progress: Callable[[int], None] = lambda tokens: None,
) -> list[DocumentLoss]:
    """Loss of each document's first max(windows) tokens by a sliding window; of the last max_strides · stride only
    when that is given.

    A token sees at least window - stride and at most window - 1 tokens before it, fewer only where the document
    begins.
    """
    length = max(windows)
    _need_tokens(documents, length)
    if not 1 <= stride < min(windows):
        raise ValueError(f"stride = {stride}: use at least 1 and less than the smallest window ({min(windows)})")
    scorer = scorer or TokenScorer(engine)
    steps = sliding_steps(window, max(windows), stride, max_strides)
    groups = sliding_groups(steps, batch_rows(engine, window, tokens_per_forward))
    sums: list[torch.Tensor] = []
    blocks = [BlockSums(steps[-1].start + steps[-1].first, length) for _ in documents]
    with engine.at_scale(scale):
        for document, own in zip(documents, blocks, strict=True):
            total = torch.zeros((), dtype=torch.float64, device=engine.model.device)
            for group in groups:
                ids = token_rows(engine, np.stack([document.tokens[s.start : s.end] for s in group]), first_token)
                nats = scorer.nats(ids, first=group[0].first)
                total += nats.sum(dtype=torch.float64)
                for step, scored in zip(group, nats, strict=True):
                    own.add(step.start + step.first, scored)
                progress(ids.numel())
            sums.append(total)
    tokens = sum(s.end - s.start - s.first for s in steps)
    within = [own.blocks(lambda low, high: high - low) for own in blocks]
    return _losses(documents, sums, within, tokens=tokens, passes=len(steps))


@dataclass(frozen=True)
class Step:
    """One window of a document, tokens start…end-1, which scores those from index `first` of the window on."""

    start: int
    end: int
    first: int


def sliding_steps(window: int, length: int, stride: int, max_strides: int | None) -> list[Step]:
    """Windows that together score each token of a document (of its end, when limited) once, last window first.

    Counted back from the document's end, so that all windows of a comparison take the same steps; a window that
    reaches the document's beginning scores everything that is left.
    """
    from_token = 1 if max_strides is None else max(1, length - max_strides * stride)
    steps: list[Step] = []
    end = length
    while end > from_token:
        start = max(0, end - window)
        low = from_token if start == 0 else max(from_token, end - stride)
        steps.append(Step(start, end, low - start))
        end = low
    return steps


def sliding_groups(steps: list[Step], batch: int) -> list[list[Step]]:
    """Steps of one shape, at most `batch` together."""
    groups: list[list[Step]] = []
    for step in steps:
        last = groups[-1][-1] if groups else None
        same = last is not None and (last.end - last.start, last.first) == (step.end - step.start, step.first)
        if same and len(groups[-1]) < batch:
            groups[-1].append(step)
        else:
            groups.append([step])
    return groups


def token_rows(engine: Engine, rows: np.ndarray, first_token: int | None) -> torch.Tensor:
    """Token ids (B, window) on the model's device."""
    ids = torch.from_numpy(rows.astype(np.int64)).to(engine.model.device)
    if first_token is not None:
        ids[:, 0] = first_token
    return ids


def batch_rows(engine: Engine, window: int, tokens_per_forward: int | None = None) -> int:
    """Windows that are read in one forward pass."""
    return max(1, (tokens_per_forward or TOKENS_PER_FORWARD.get(engine.model.device.type, 4096)) // window)


def _need_tokens(documents: Sequence[Document], length: int) -> None:
    if not documents:
        raise ValueError("documents = []: give at least one")
    for document in documents:
        if len(document.tokens) < length:
            raise ValueError(
                f"document {document.name} has {len(document.tokens)} tokens, the largest window {length}: "
                "leave it out or lower windows"
            )


def _losses(
    documents: Sequence[Document], sums: list[torch.Tensor], blocks: list[Blocks], *, tokens: int, passes: int
) -> list[DocumentLoss]:
    nats = torch.stack(sums).tolist()
    return [
        DocumentLoss(document.name, value, tokens, passes, own)
        for document, value, own in zip(documents, nats, blocks, strict=True)
    ]
