"""Who holds which page, against a count kept by hand; hash chains that keep scales and texts apart."""

from __future__ import annotations

import random

import pytest

from e2llm.engine.pages import Pages, page_key, root_key


def chain(scale: float, *texts: tuple[int, ...]) -> list[bytes]:
    keys = [root_key(scale)]
    for text in texts:
        keys.append(page_key(keys[-1], text))
    return keys[1:]


def test_keys_tell_scales_texts_and_places_apart() -> None:
    keys = [*chain(1.0, (1, 2), (3, 4)), *chain(2.0, (1, 2), (3, 4)), *chain(1.0, (3, 4), (1, 2)), *chain(1.0, (1, 3))]
    assert len(set(keys)) == len(keys)
    assert chain(1.0, (1, 2), (3, 4)) == chain(1.0, (1, 2), (3, 4))
    assert chain(1.0, (258,)) != chain(1.0, (2, 1)), "token ids are not run together"


def test_a_shared_page_is_free_once_nobody_holds_it() -> None:
    pages = Pages(3)
    page = pages.take()
    pages.hold(page)
    pages.release([page])
    assert (pages.available, pages.used) == (2, 1)
    pages.release([page])
    assert (pages.available, pages.used) == (3, 0)
    with pytest.raises(AssertionError, match="more often"):
        pages.release([page])


def test_idle_pages_are_kept_until_needed_oldest_first() -> None:
    pages = Pages(3)
    keys = chain(1.0, (1,), (2,), (3,))
    held = [pages.take() for _ in keys]
    for page, key in zip(held, keys, strict=True):
        pages.register(page, key)
    pages.release(reversed(held))
    assert (pages.available, pages.used) == (3, 3) and all(pages.is_idle(page) for page in held)
    assert pages.take() == held[2], "the end of a text is of use with its beginning only"
    assert [pages.find(key) for key in keys] == [held[0], held[1], None]
    pages.hold(held[1])
    assert pages.take() == held[0] and pages.available == 0
    pages.release([held[1]])
    pages.clear_idle()
    assert pages.find(keys[1]) is None and pages.used == 2


def test_a_text_has_one_page() -> None:
    pages = Pages(2)
    first, second = pages.take(), pages.take()
    key = chain(1.0, (1,))[0]
    pages.register(first, key)
    pages.register(second, key)
    assert pages.find(key) == first
    pages.release([second])
    assert pages.used == 1, "the other one is free"


def test_distrusted_pages_are_wiped_by_their_next_owner() -> None:
    pages = Pages(2)
    page = pages.take()
    key = chain(1.0, (1,))[0]
    pages.register(page, key)
    pages.distrust([page])
    assert pages.find(key) is None
    pages.release([page])
    assert pages.used == 0
    assert pages.to_wipe([1, 2]) == [page] and pages.to_wipe([1, 2]) == []


def test_no_page_is_lost_or_given_twice() -> None:
    """Random requests that take, share, register, end and fail; every page is somewhere exactly once."""
    chance = random.Random(0)
    pages = Pages(20)
    holders: list[list[int]] = []
    texts = chain(2.0, *((n,) for n in range(12)))
    for _ in range(3000):
        wanted = chance.randint(1, 6)
        if chance.random() < 0.5 and pages.available >= wanted:
            found = pages.find(chance.choice(texts))
            held = [] if found is None else [found]
            for page in held:
                pages.hold(page)
            held += [pages.take() for _ in range(min(wanted, pages.available))]
            for page in held:
                if chance.random() < 0.5:
                    pages.register(page, chance.choice(texts))
            holders.append(held)
        elif holders:
            held = holders.pop(chance.randrange(len(holders)))
            if chance.random() < 0.1:
                pages.distrust(held)
            pages.release(reversed(held))
        busy = {page for held in holders for page in held}
        idle = {page for page in range(1, 21) if pages.is_idle(page)}
        assert not busy & idle and 0 not in busy
        assert pages.used == len(busy | idle) and pages.available == 20 - len(busy)
