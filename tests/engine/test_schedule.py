"""Which tokens a step computes: everybody who decodes, and prompts within the budget, none starved."""

from __future__ import annotations

from collections.abc import Sequence

from e2llm.engine.pages import Pages
from e2llm.engine.request import Admission, Request
from e2llm.engine.running import Running, pages_needed
from e2llm.engine.schedule import next_step
from e2llm.engine.stream import QueueStream

PAGE = 4


def row(prompt: Sequence[int], *, new: int = 4, scale: float = 1.0) -> Running:
    admission = Admission(scale, 1000, len(prompt), new)
    return Running(Request(prompt_ids=tuple(prompt)), QueueStream(admission, lambda: None), None, frozenset(), PAGE)


def admitted(pages: Pages, *rows: Running) -> list[Running]:
    assert all(one.admit(pages, True) for one in rows)
    return list(rows)


def counts(rows: list[Running], chunk: int, share: bool = False) -> list[int]:
    """Tokens that each of `rows` gets in the next step."""
    step = dict(next_step(rows, chunk, share=share))
    return [step.get(one, 0) for one in rows]


def test_half_for_the_oldest_and_half_for_the_shortest() -> None:
    long, middle, short = rows = admitted(Pages(100), row(range(200)), row(range(50)), row(range(6)))
    assert counts(rows, 16) == [8, 2, 6]
    assert counts(rows, 100) == [50, 44, 6]
    assert counts([long], 16) == [16] and counts([middle, short], 16) == [10, 6]
    assert counts(rows, 1) == [1, 0, 0]


def test_decoding_rows_get_a_token_beside_the_budget_and_stand_first() -> None:
    first, second, prompt = rows = admitted(Pages(100), row(range(30)), row(range(9)), row(range(40)))
    for one in (first, second):
        one.computed = one.prompt_tokens
        one.extend(5, None)
    assert counts(rows, 12) == [1, 1, 12]
    assert [one for one, _ in next_step(rows, 12, share=False)] == [second, first, prompt], "by length"


def test_the_same_page_is_computed_once_in_a_step() -> None:
    pages = Pages(100)
    one, two, other, scaled = rows = admitted(
        pages, row(range(20)), row(range(20)), row(range(1, 21)), row(range(20), scale=2.0)
    )
    assert counts(rows, 1000, share=True) == [20, 0, 20, 20]
    one.advance(20, pages, True)
    assert two.adopt(pages) == 16, "the last token is always computed"
    assert counts([two], 1000, share=True) == [4]
    assert other.adopt(pages) == scaled.adopt(pages) == 0
    for finished in rows:
        finished.release(pages)
    pages.clear_idle()
    assert pages.used == 0


def test_admission_takes_all_pages_or_none() -> None:
    pages = Pages(8)
    assert pages_needed(17, 4, PAGE) == 5 and pages_needed(17, 5, PAGE) == 6  # the last new token needs no slot
    first, second = row(range(17)), row(range(17))
    assert first.admit(pages, True) and not second.admit(pages, True)
    assert pages.available == 3 and len(second.table) == 0
    first.advance(17, pages, True)
    assert second.admit(pages, True), "four of its five pages are there"
    assert (second.computed, pages.available) == (16, 2)
    assert second.table[:4].tolist() == first.table[:4].tolist()
