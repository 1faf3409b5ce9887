"""Who gets memory next: shorter requests go past one that waits, and never so often that it starves."""

from __future__ import annotations

import random
from collections import deque

import pytest
from batches import collect, expected_tokens, prompt, tiny_engine

from e2llm.engine import admission
from e2llm.engine.admission import admit
from e2llm.engine.pages import Pages
from e2llm.engine.request import Admission, Request
from e2llm.engine.running import Running
from e2llm.engine.stream import QueueStream

PAGE = 4


def row(num_pages: int) -> Running:
    """A request that needs so many pages: all prompt, one new token."""
    tokens = num_pages * PAGE
    stream = QueueStream(Admission(1.0, 10_000, tokens, 1), lambda: None)
    return Running(Request(prompt_ids=tuple(range(tokens))), stream, None, frozenset(), PAGE)


def test_shorter_ones_pass_and_order_is_kept_otherwise() -> None:
    pages = Pages(10)
    first, large, small, other, last = rows = [row(8), row(9), row(1), row(2), row(1)]
    waiting = deque(rows)
    assert admit(waiting, pages, 10, share=False) == [first, small, last]
    assert list(waiting) == [large, other] and (large.passed, other.passed) == (2, 1)
    first.release(pages)
    assert admit(waiting, pages, 10, share=False) == [other], "eight of nine pages are free"
    small.release(pages)
    last.release(pages)
    other.release(pages)
    assert admit(waiting, pages, 10, share=False) == [large] and not waiting


def test_places_are_first_come_first_served() -> None:
    rows = [row(1) for _ in range(5)]
    waiting = deque(rows)
    assert admit(waiting, Pages(10), 2, share=False) == rows[:2] and list(waiting) == rows[2:]
    assert admit(waiting, Pages(10), 0, share=False) == [] and list(waiting) == rows[2:]


def test_nobody_is_passed_more_often_than_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "MOST_PASSED", 3)
    pages, waiting = Pages(10), deque([row(10)])
    large = waiting[0]
    running = [row(1)]
    assert running[0].admit(pages, False)
    for _ in range(10):
        waiting.append(row(1))
        running += admit(waiting, pages, 100, share=False)
    assert large.passed == 3 and len(running) == 4 and waiting[0] is large
    while running:
        running.pop().release(pages)
    assert admit(waiting, pages, 100, share=False) == [large]


@pytest.mark.parametrize("seed", range(20))
def test_everybody_is_served_while_requests_keep_coming(seed: int) -> None:
    """A thousand steps of a random stream that never lets up: from arrival on, at most `MOST_PASSED` and those already
    ahead are admitted before anybody."""
    draw = random.Random(seed)
    pages, waiting, running = Pages(20), deque[Running](), list[tuple[int, Running]]()
    arrived: dict[Running, int] = {}
    order: list[Running] = []
    for step in range(1000):
        for _ in range(draw.randrange(3)):
            one = row(draw.choice([1, 1, 1, 2, 5, 18, 20]))
            arrived[one] = len(arrived)
            waiting.append(one)
        admitted = admit(waiting, pages, 6 - len(running), share=False)
        order += admitted
        running += [(step + draw.randrange(1, 6), one) for one in admitted]
        for end, one in [pair for pair in running if pair[0] <= step]:
            one.release(pages)
            running.remove((end, one))
    assert len(order) > 300
    for place, one in enumerate(order):
        later = sum(arrived[other] > arrived[one] for other in order[:place])
        assert later == one.passed <= admission.MOST_PASSED
    assert all(one.passed <= admission.MOST_PASSED for one in waiting)
    assert min(arrived[one] for one in waiting) >= len(order) - admission.MOST_PASSED - 1


def test_in_the_engine_a_short_request_passes_and_a_long_one_is_served_in_between(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(admission, "MOST_PASSED", 2)
    with tiny_engine(kv_tokens=192, page_tokens=16, prefix_cache=False) as engine:
        first = engine.submit(Request(prompt_ids=prompt(60), max_new_tokens=60))  # eight pages of twelve
        large = engine.submit(Request(prompt_ids=prompt(90), max_new_tokens=6))  # six
        shorts = [Request(prompt_ids=prompt(5, n), max_new_tokens=40) for n in range(8)]  # three each
        streams = [engine.submit(request) for request in shorts]
        collect(first)
        assert collect(large).finish_reason == "length"
        earlier = []
        for request, stream in zip(shorts, streams, strict=True):
            firsts = next(stream)
            earlier.append(stream.made_at < large.made_at)
            rest = collect(stream).tokens
            assert firsts.token_ids + rest == expected_tokens("llama", "yarn", request, stream.admission.scale)
        assert earlier[0] and not all(earlier), "one went past for lack of room for more; it did not wait for all"
