"""What the next step computes: a token of every request that decodes, and pieces of prompts up to a budget.

Flows in: running requests, oldest first. Flows out: (request, tokens) pairs. No torch.
"""

from __future__ import annotations

from collections.abc import Sequence

from e2llm.engine.running import Running


def next_step(running: Sequence[Running], chunk_tokens: int, *, share: bool) -> list[tuple[Running, int]]:
    """Pairs in the order of the packed row: what decodes, by length, then pieces of prompts, by length; single tokens
    before chunks. Empty where all that run have got all their tokens and these are only not read yet.

    Of `chunk_tokens` prompt tokens half are the oldest prompt's and half go to the prompts with the fewest tokens
    left, so that a short one behind a long one is read at once and the long one still moves; what either half leaves
    is the other's. With `share`, a prompt whose next page another is computing in this step waits for it.
    """
    decoding = [(row, 1) for row in running if row.decoding and not row.complete]
    prompts = [row for row in running if not row.decoding]
    budget = _Budget(chunk_tokens, share)
    if prompts:
        budget.give(prompts[0], -(-chunk_tokens // 2))
        for row in sorted(prompts, key=lambda row: row.remaining):
            budget.give(row, chunk_tokens)
        budget.give(prompts[0], chunk_tokens)
    step = decoding + list(budget.counts.items())
    return sorted(step, key=lambda pair: (pair[1] > 1, not pair[0].decoding, pair[0].computed))


class _Budget:
    """Prompt tokens of one step and who got them."""

    def __init__(self, tokens: int, share: bool) -> None:
        self.left, self.share = tokens, share
        self.counts: dict[Running, int] = {}
        self._computing: set[bytes] = set()

    def give(self, row: Running, most: int) -> None:
        """Up to `most` more tokens of the prompt of `row`."""
        before = self.counts.get(row, 0)
        count = min(row.remaining - before, most, self.left)
        if count <= 0:
            return
        if self.share:
            page = row.shareable_page()
            if not before and page is not None and row.key(page) in self._computing:
                return
            self._computing.update(row.prompt_keys(before + count))
        self.counts[row] = before + count
        self.left -= count
