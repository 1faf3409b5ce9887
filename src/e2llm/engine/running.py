"""One admitted request inside the engine: its tokens, its pages, how far it has been computed, its text.

Flows in: a request and its plan. Flows out: the state that the scheduler reads and a step moves on. No tensors.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from e2llm.engine.pages import Pages, page_key, root_key
from e2llm.engine.request import FinishReason, Output, Request, TokenLogprob
from e2llm.engine.stream import QueueStream
from e2llm.engine.text import TextStream


@dataclass(frozen=True)
class Turning:
    """Cached pages of another scale that a request goes on from; held until they are read."""

    sources: tuple[int, ...]
    targets: tuple[int, ...]
    first_position: int
    """Of the first page's first token."""
    scale: float
    """Of the sources."""


class Running:
    """State of one request. Everything but the stream belongs to the engine's thread."""

    def __init__(
        self, request: Request, stream: QueueStream, tokenizer: Any, ends: frozenset[int], page_tokens: int
    ) -> None:
        self.request, self.stream = request, stream
        self.scale = stream.admission.scale
        self.max_new_tokens = stream.admission.max_new_tokens
        self.tokens = list(request.prompt_ids)
        """Prompt, then new tokens."""
        self.prompt_tokens = len(self.tokens)
        self.computed = 0
        """Tokens whose keys are in the pages; they are the first ones."""
        self.cached = 0
        """Of these, taken from the prefix cache."""
        self.table = np.zeros(0, dtype=np.int64)
        """(pages,) block table, whole from admission on: a running request never waits for memory."""
        self.place = -1
        """Row of the engine's buffers on the device, while running."""
        self.pending = 0
        """Tokens that were drawn and not read yet: the device knows them, nobody else does."""
        self.ended = False
        self.passed = 0
        """Requests that came later and were admitted before it."""
        self.source = random.Random(request.sampling.seed)
        self._text = TextStream(tokenizer, request.sampling.stop)
        self._ends = frozenset() if request.sampling.ignore_eos else ends
        self.page_tokens = page_tokens
        self.turning: Turning | None = None
        """What has to be turned into its pages before its first step."""
        self.turned = 0
        """Tokens whose keys came from another scale."""
        self._root = root_key(self.scale)
        self._chains: dict[bytes, list[bytes]] = {}
        self._registered = 0

    @property
    def new_tokens(self) -> int:
        return len(self.tokens) - self.prompt_tokens

    @property
    def remaining(self) -> int:
        """Tokens to compute before the next one can be drawn; 1 while decoding."""
        return len(self.tokens) + self.pending - self.computed

    @property
    def decoding(self) -> bool:
        """The prompt is read, and a token was drawn."""
        return self.new_tokens + self.pending > 0

    @property
    def complete(self) -> bool:
        """All tokens that it may have were drawn."""
        return self.new_tokens + self.pending >= self.max_new_tokens

    @property
    def pages_needed(self) -> int:
        """For all keys that will ever be written; the last token's are not."""
        return pages_needed(self.prompt_tokens, self.max_new_tokens, self.page_tokens)

    def key(self, index: int) -> bytes:
        """Key of page `index`, which its tokens fill."""
        return self._key(self._root, index)

    def _key(self, root: bytes, index: int) -> bytes:
        keys, size = self._chains.setdefault(root, []), self.page_tokens
        while len(keys) <= index:
            done = len(keys)
            keys.append(page_key(keys[-1] if keys else root, self.tokens[done * size : (done + 1) * size]))
        return keys[index]

    def prompt_keys(self, count: int) -> list[bytes]:
        """Keys of the prompt's full pages that its next `count` tokens write to."""
        last = min(-(-(self.computed + count) // self.page_tokens), self.prompt_tokens // self.page_tokens)
        return [self.key(index) for index in range(self.computed // self.page_tokens, last)]

    def shareable_page(self) -> int | None:
        """Index of the page that comes next, if it could be found in the prefix cache: nothing of it is computed, it
        is full of prompt, and after it there is a token left to compute."""
        index, begun = divmod(self.computed, self.page_tokens)
        return None if begun or (index + 1) * self.page_tokens >= self.prompt_tokens else index

    def admit(self, pages: Pages, use_cache: bool, others: Sequence[float] = ()) -> bool:
        """Take all pages that the request will need, shared ones from the prefix cache; False, and nothing taken,
        while there are too few.

        With `others`, scales whose keys may be turned into its own, the cache goes on with theirs where its own ends:
        `turning` then says what has to be done.
        """
        last = (self.prompt_tokens - 1) // self.page_tokens if use_cache else 0
        root, scale, sources = self._root, self.scale, list[int]()
        shared = self._cached(pages, root, 0, last)
        if others:
            root = root_key(self.scale, turned=True)
            turned = self._cached(pages, root, len(shared), last)
            for other in others:
                for its_root in (root_key(other), root_key(other, turned=True)):
                    found = self._cached(pages, its_root, len(shared), last)
                    sources, scale = (found, other) if len(found) > len(sources) else (sources, scale)
            if len(turned) >= len(sources):
                shared, sources, scale = shared + turned, [], self.scale
            root = root if turned or sources else self._root
        fresh = self.pages_needed - len(shared)
        if sources and pages.available - sum(map(pages.is_idle, shared + sources)) < fresh:
            root, sources = self._root, []  # their memory may be what it waits for: it reads again
        if pages.available - sum(map(pages.is_idle, shared)) < fresh:
            return False
        for page in shared + sources:
            pages.hold(page)
        taken = [pages.take() for _ in range(fresh)]
        self.table = np.array(shared + taken, dtype=np.int64)
        if sources:
            first = len(shared) * self.page_tokens
            self.turning = Turning(tuple(sources), tuple(taken[: len(sources)]), first, scale)
        self._root, self._registered = root, len(shared)
        self.turned = len(sources) * self.page_tokens
        self.computed = self.cached = len(shared) * self.page_tokens + self.turned
        return True

    def _cached(self, pages: Pages, root: bytes, first: int, last: int) -> list[int]:
        """Pages of its text in the cache, under `root`, from page `first` on as far as they go."""
        found: list[int] = []
        for index in range(first, last):
            page = pages.find(self._key(root, index))
            if page is None:
                break
            found.append(page)
        return found

    def adopt(self, pages: Pages) -> int:
        """Take over pages that another request has filled with the same text since admission; their tokens."""
        before = self.cached
        while (index := self.shareable_page()) is not None:
            page, own = pages.find(self.key(index)), int(self.table[index])
            if page is None:
                break
            pages.hold(page)
            pages.release([own])
            self.table[index] = page
            self._registered = index + 1
            self.computed += self.page_tokens
            self.cached += self.page_tokens
        return self.cached - before

    def advance(self, count: int, pages: Pages, use_cache: bool) -> None:
        """The keys of `count` more tokens are in the pages."""
        self.computed += count
        known = min(self.computed, len(self.tokens))  # a page's key is that of its tokens
        for index in range(self._registered, known // self.page_tokens if use_cache else 0):
            pages.register(int(self.table[index]), self.key(index))
            self._registered = index + 1

    def release(self, pages: Pages) -> None:
        """Give all pages back."""
        pages.release(reversed(self.table.tolist()))
        self.table = self.table[:0]

    def extend(self, token: int, logprob: TokenLogprob | None) -> Output:
        """A new token was drawn; what the caller gets."""
        self.tokens.append(token)
        text, stopped = self._text.push(token)
        reason: FinishReason | None = None
        if token in self._ends or stopped:
            reason = "stop"
        elif self.new_tokens == self.max_new_tokens:
            reason = "length"
        if reason is not None and not stopped:
            text += self._text.rest()
        return Output(text, (token,), () if logprob is None else (logprob,), reason)


def pages_needed(prompt_tokens: int, max_new_tokens: int, page_tokens: int) -> int:
    """Pages for every key that a request will ever write; the last new token's are not."""
    return -(-(prompt_tokens + max_new_tokens - 1) // page_tokens)
