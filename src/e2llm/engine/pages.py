"""Which page belongs to whom: a free list, reference counts, and a prefix cache of pages by the hash of their text.

Flows in: requests for pages, and full pages with their keys. Flows out: page numbers. No tensors: page i of every
layer is the same request's. Page 0 is nobody's (`hf.packed.NULL_PAGE`).
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence


def root_key(scale: float, *, turned: bool = False) -> bytes:
    """Begins the hash chain of a text at `scale`: cached keys carry their scale's rotation, so no two scales share.

    `turned`: of a text some of whose keys were turned from another scale; nothing exact is found through it.
    """
    return hashlib.blake2b(f"scale {scale!r}{' turned' * turned}".encode(), digest_size=16).digest()


def page_key(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Key of a full page: of its tokens and, through `parent`, of all before it."""
    return hashlib.blake2b(parent + array("q", token_ids).tobytes(), digest_size=16).digest()


class Pages:
    """A page is free, held by one or more requests, or idle: kept by the prefix cache alone until it is needed."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages, 0, -1))
        self._holders = [0] * (num_pages + 1)
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._distrusted: set[int] = set()

    @property
    def available(self) -> int:
        """Pages that could be taken now: free or idle."""
        return len(self._free) + len(self._idle)

    @property
    def used(self) -> int:
        """Pages that hold something: of requests or of the prefix cache."""
        return self.num_pages - len(self._free)

    def is_idle(self, page: int) -> bool:
        return page in self._idle

    def find(self, key: bytes) -> int | None:
        """The page with this text, or None."""
        return self._page_of.get(key)

    def hold(self, page: int) -> None:
        """One more request reads `page`."""
        self._idle.pop(page, None)
        self._holders[page] += 1

    def take(self) -> int:
        """A page for one request to write; the least recently used idle one where none is free."""
        if not self._free:
            page, _ = self._idle.popitem(last=False)
            self._forget(page)
            self._free.append(page)
        page = self._free.pop()
        self._holders[page] = 1
        return page

    def release(self, pages: Iterable[int]) -> None:
        """One request less holds each of `pages`; give a text's last page first: it is of use only with those
        before it, and goes first when memory is needed."""
        for page in pages:
            self._holders[page] -= 1
            assert self._holders[page] >= 0, f"page {page} was released more often than held"
            if self._holders[page]:
                continue
            if page in self._key_of:
                self._idle[page] = None
            else:
                self._free.append(page)

    def register(self, page: int, key: bytes) -> None:
        """`page` is full and holds the text of `key`; does nothing where another page has it already."""
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def distrust(self, pages: Iterable[int]) -> None:
        """What `pages` hold may be anything: nobody new shares it, and their next owner has to wipe them."""
        for page in pages:
            self._forget(page)
            self._distrusted.add(page)

    def to_wipe(self, pages: Iterable[int]) -> list[int]:
        """Those of a new owner's `pages` that hold what may be anything; asked once, they are trusted again."""
        found = [page for page in pages if page in self._distrusted]
        self._distrusted.difference_update(found)
        return found

    def clear_idle(self) -> None:
        """Empty the prefix cache of what no running request holds."""
        for page in self._idle:
            self._forget(page)
            self._free.append(page)
        self._idle.clear()

    def _forget(self, page: int) -> None:
        key = self._key_of.pop(page, None)
        if key is not None:
            del self._page_of[key]
