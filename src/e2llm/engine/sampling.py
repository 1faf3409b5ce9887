"""Next tokens of many requests at once: logits go in, a token for each row comes out, with its log probability.

A row's draw depends on its own logits, settings and random numbers alone, whatever rows stand beside it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from e2llm.engine.request import Sampling, TokenLogprob

# N = rows, V = vocabulary size


@dataclass(frozen=True)
class Drawn:
    """What one row got."""

    token: int
    logprob: TokenLogprob | None


def draw(logits: torch.Tensor, samplings: Sequence[Sampling], sources: Sequence[random.Random]) -> list[Drawn | None]:
    """Tokens for logits (N, V); None for a row whose logits are no numbers. Each row that is not greedy takes one
    number from its source."""
    logits = logits.float()
    best, tokens = logits.max(dim=-1)  # a maximum passes NaN on
    sound = torch.isfinite(best).tolist()
    drawing = [row for row, sampling in enumerate(samplings) if sampling.temperature > 0 and sound[row]]
    # By kind and not by batch, or the same number would mean another token in other company.
    for kind in (False, True):
        rows = [row for row in drawing if _filters(samplings[row]) is kind]
        if rows:
            numbers = [sources[row].random() for row in rows]
            pick = _pick_filtered if kind else _pick
            tokens[rows] = pick(logits[rows], [samplings[row] for row in rows], numbers)
    chosen: list[int] = tokens.tolist()
    wanted = [row for row, sampling in enumerate(samplings) if sampling.logprobs is not None and sound[row]]
    found = dict(zip(wanted, _logprobs(logits[wanted], chosen, wanted, samplings), strict=True)) if wanted else {}
    return [Drawn(chosen[row], found.get(row)) if sound[row] else None for row in range(len(samplings))]


def _filters(sampling: Sampling) -> bool:
    return sampling.top_p < 1 or sampling.top_k > 0 or sampling.min_p > 0


def _column(values: Sequence[float], like: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=like.device)[:, None]


def _invert(masses: torch.Tensor, numbers: Sequence[float]) -> torch.Tensor:
    """Place (N,) in each row of `masses` (N, V) where its number of 0…1 falls, by their cumulated sums."""
    sums = masses.cumsum(dim=-1, dtype=torch.float64)
    total = sums[:, -1:]
    spot = _column(numbers, masses, torch.float64) * total
    spot = torch.minimum(spot, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(sums, spot, right=True)[:, 0]


def _probabilities(logits: torch.Tensor, samplings: Sequence[Sampling]) -> torch.Tensor:
    """(N, V) at each row's temperature; however small it is, the largest logit stays finite."""
    temperatures = _column([max(s.temperature, 1e-30) for s in samplings], logits)
    return torch.softmax((logits - logits.max(dim=-1, keepdim=True).values) / temperatures, dim=-1)


def _pick(logits: torch.Tensor, samplings: Sequence[Sampling], numbers: Sequence[float]) -> torch.Tensor:
    return _invert(_probabilities(logits, samplings), numbers)


def _pick_filtered(logits: torch.Tensor, samplings: Sequence[Sampling], numbers: Sequence[float]) -> torch.Tensor:
    """Temperature, then the `top_k` most probable, of these the smallest set that holds `top_p` of their mass, of
    these the ones with at least `min_p` of the largest probability."""
    size = logits.shape[-1]
    masses, tokens = _probabilities(logits, samplings).sort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(size, device=logits.device)
    masses = masses.masked_fill(ranks >= _column([s.top_k or size for s in samplings], logits, torch.int64), 0)
    total = masses.sum(dim=-1, keepdim=True)
    before = masses.cumsum(dim=-1) - masses
    kept = before < _column([s.top_p for s in samplings], logits) * total
    kept |= _column([s.top_p for s in samplings], logits) >= 1
    kept[:, 0] = True  # also where top_p is too small for float32
    kept &= masses >= _column([s.min_p for s in samplings], logits) * masses[:, :1]
    place = _invert(masses.masked_fill(~kept, 0), numbers)
    return tokens.gather(1, place[:, None])[:, 0]


def _logprobs(
    logits: torch.Tensor, chosen: Sequence[int], rows: Sequence[int], samplings: Sequence[Sampling]
) -> list[TokenLogprob]:
    """Of the model's own distribution, at temperature 1."""
    everything = torch.log_softmax(logits, dim=-1)
    own = everything.gather(1, torch.tensor([[chosen[row]] for row in rows], device=logits.device))[:, 0].tolist()
    counts = [min(samplings[row].logprobs or 0, logits.shape[-1]) for row in rows]
    values, tokens = everything.topk(max(counts), dim=-1) if max(counts) else (everything[:, :0], everything[:, :0])
    tops = [
        list(zip(t, v, strict=True))[:count]
        for t, v, count in zip(tokens.tolist(), values.tolist(), counts, strict=True)
    ]
    return [TokenLogprob(chosen[row], own[i], tuple((int(t), v) for t, v in tops[i])) for i, row in enumerate(rows)]
