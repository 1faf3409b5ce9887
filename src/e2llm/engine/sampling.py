"""Next tokens of many requests at once: logits go in, a token for each row comes out, with its log probability.

Everything is computed where the logits are and queued there; one transfer brings the tokens over (and three more, not
one a row, the log probabilities where they are wanted). A row's draw depends on its own logits, settings and random
numbers alone, whatever rows stand beside it.
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


class Draws:
    """Tokens that were drawn, on their way from the device."""

    def __init__(
        self, tokens: torch.Tensor, wanted: list[tuple[int, Sampling]], logprobs: tuple[torch.Tensor, ...]
    ) -> None:
        self.tokens = tokens
        """(N,) int64 on the device; -1 for a row whose logits are no numbers."""
        self._wanted = wanted
        self._host = [_to_host(tensor) for tensor in (tokens, *logprobs)]

    def read(self) -> list[Drawn | None]:
        """A row's token, None where its logits are no numbers. On CUDA the caller has waited for what was queued."""
        chosen: list[int] = self._host[0].tolist()
        found: dict[int, TokenLogprob] = {}
        if self._wanted:
            own, values, tokens = (tensor.tolist() for tensor in self._host[1:])
            for place, (row, sampling) in enumerate(self._wanted):
                tops = list(zip(tokens[place], values[place], strict=True))[: sampling.logprobs]
                found[row] = TokenLogprob(chosen[row], own[place], tuple(tops))
        return [Drawn(token, found.get(row)) if token >= 0 else None for row, token in enumerate(chosen)]


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Queued, where there is a queue: into memory that the device reaches by itself."""
    if not tensor.is_cuda:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def draw(logits: torch.Tensor, samplings: Sequence[Sampling], sources: Sequence[random.Random]) -> list[Drawn | None]:
    """Tokens for logits (N, V); None for a row whose logits are no numbers."""
    draws = start_draw(logits, samplings, sources)
    if logits.is_cuda:
        torch.cuda.synchronize(logits.device)
    return draws.read()


def start_draw(logits: torch.Tensor, samplings: Sequence[Sampling], sources: Sequence[random.Random]) -> Draws:
    """Queue the draw of a token for each row of logits (N, V). Each row that is not greedy takes one number from its
    source."""
    best, tokens = logits.max(dim=-1)  # a maximum passes NaN on
    drawing = [row for row, sampling in enumerate(samplings) if sampling.temperature > 0]
    # By kind and not by batch, or the same number would mean another token in other company.
    for kind in (False, True):
        rows = [row for row in drawing if _filters(samplings[row]) is kind]
        if rows:
            numbers = [sources[row].random() for row in rows]
            pick = _pick_filtered if kind else _pick
            all_of_them = len(rows) == len(samplings)
            index = slice(None) if all_of_them else torch.tensor(rows).to(logits.device, non_blocking=True)
            tokens[index] = pick(logits[index].float(), [samplings[row] for row in rows], numbers)
    wanted = [(row, sampling) for row, sampling in enumerate(samplings) if sampling.logprobs is not None]
    logprobs: tuple[torch.Tensor, ...] = ()
    if wanted:
        index = torch.tensor([row for row, _ in wanted]).to(logits.device, non_blocking=True)
        logprobs = _logprobs(logits[index].float(), tokens[index], max(s.logprobs or 0 for _, s in wanted))
    return Draws(torch.where(torch.isfinite(best), tokens, -1), wanted, logprobs)


def _filters(sampling: Sampling) -> bool:
    return sampling.top_p < 1 or sampling.top_k > 0 or sampling.min_p > 0


def _column(values: Sequence[float], like: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype).to(like.device, non_blocking=True)[:, None]


def _invert(masses: torch.Tensor, numbers: Sequence[float]) -> torch.Tensor:
    """Place (N,) in each row of `masses` (N, V) where its number of 0…1 falls, by their cumulated sums."""
    sums = masses.cumsum(dim=-1, dtype=torch.float64)
    total = sums[:, -1:]
    spot = _column(numbers, masses, torch.float64) * total
    spot = torch.minimum(spot, torch.nextafter(total, torch.zeros_like(total)))
    # Where the masses are no numbers the search ends behind the last one.
    return torch.searchsorted(sums, spot, right=True)[:, 0].clamp(max=masses.shape[-1] - 1)


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


def _logprobs(logits: torch.Tensor, chosen: torch.Tensor, most: int) -> tuple[torch.Tensor, ...]:
    """Of the model's own distribution, at temperature 1: (M,) of the chosen tokens, (M, K) of the K = `most` most
    probable, their tokens (M, K)."""
    everything = torch.log_softmax(logits, dim=-1)
    own = everything.gather(1, chosen[:, None])[:, 0]
    return (own, *everything.topk(min(most, logits.shape[-1]), dim=-1))
