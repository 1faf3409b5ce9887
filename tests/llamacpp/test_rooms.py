"""Which context a request gets, and which idle one makes room."""

from __future__ import annotations

import random

from e2llm.llamacpp.rooms import CELLS, Decision, Room, decide, padded

SIZES = {"total": 4096, "usual": 1024, "most_requests": 4}


def test_the_first_request_opens_a_context_of_the_usual_size() -> None:
    assert decide([], 1.0, 100, **SIZES) == Decision((), 1024)
    assert decide([], 1.0, 1025, **SIZES) == Decision((), 1280), "what it needs, in whole steps"
    assert decide([], 1.0, 4097, **SIZES) is None


def test_a_context_with_room_is_used() -> None:
    assert decide([Room(1.0, 1024, 900, 1)], 1.0, 124, **SIZES) == Decision()
    assert decide([Room(1.0, 1024, 900, 1)], 1.0, 125, **SIZES) is None, "it runs: wait until it is idle"
    assert decide([Room(1.0, 1024, 4, 4)], 1.0, 1, **SIZES) is None, "no sequence is left"


def test_an_idle_one_that_is_too_small_is_replaced() -> None:
    assert decide([Room(1.0, 1024, 0)], 1.0, 2000, **SIZES) == Decision((1.0,), 2048)


def test_the_least_recently_used_idle_one_goes_first() -> None:
    rooms = [Room(1.0, 1024, 50, 1), Room(2.0, 1024, 0), Room(4.0, 1024, 0), Room(8.0, 1024, 0)]
    assert decide(rooms, 16.0, 10, **SIZES) == Decision((2.0,), 1024)
    assert decide(rooms, 16.0, 2000, **SIZES) == Decision((2.0, 4.0), 2048)
    assert decide(rooms, 16.0, 3072, **SIZES) == Decision((2.0, 4.0, 8.0), 3072)
    assert decide(rooms, 16.0, 3073, **SIZES) is None, "what runs is never dropped"


def test_less_than_usual_where_others_run() -> None:
    assert decide([Room(1.0, 3584, 50, 1)], 2.0, 100, **SIZES) == Decision((), 512)


def test_the_budget_holds_whatever_comes() -> None:
    draw = random.Random(0)
    rooms: list[Room] = []
    taken = refused = 0
    for _ in range(3000):
        if rooms and draw.random() < 0.4:  # a request ends
            place = draw.randrange(len(rooms))
            rooms[place] = Room(rooms[place].scale, rooms[place].size, 0)
        scale, needed = draw.choice([1.0, 2.0, 3.0, 8.0]), draw.randint(1, 4200)
        found = decide(rooms, scale, needed, **SIZES)
        if found is None:
            refused += 1
            continue
        dropped = [room for room in rooms if room.scale in found.drop]
        assert not any(room.used for room in dropped)
        rooms = [room for room in rooms if room not in dropped]
        if found.open_size:
            assert found.open_size % CELLS == 0 and found.open_size >= needed
            assert not any(room.scale == scale for room in rooms)
            rooms.append(Room(scale, found.open_size, 0))
        own = next(room for room in rooms if room.scale == scale)
        rooms.remove(own)
        rooms.append(Room(scale, own.size, own.used + needed, own.requests + 1))
        assert rooms[-1].used <= own.size and sum(room.size for room in rooms) <= SIZES["total"]
        taken += 1
    assert taken > 500 and refused > 500
    assert padded(1) == 256 and padded(256) == 256 and padded(257) == 512
