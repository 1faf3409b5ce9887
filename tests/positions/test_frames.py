"""Keys moved through frames stand where SelfExtend's distances want them. Numbers alone."""

from __future__ import annotations

import random

import pytest

from e2llm.positions.frames import Frame, Frames, Move, usual_frames

CASES = [(2, 16), (3, 22), (4, 2), (5, 17), (8, 22), (16, 7), (40, 11), (2, 3), (9, 64)]


def distance(query: int, key: int, group: int, neighbours: int) -> int:
    """SelfExtend's, from its paper: Sect. 3.2, with the shift that lets far distances go on where near ones end."""
    if query - key < neighbours:
        return query - key
    return query // group + (neighbours - neighbours // group) - key // group


def apply(moves: list[Move], positions: list[int]) -> None:
    """As llama.cpp does: whatever stands in a range goes on, whoever it is."""
    for move in moves:
        for key, position in enumerate(positions):
            if move.first <= position < move.last:
                positions[key] = position + move.by


def read(frames: Frames, prompt: int, new: int, pieces: random.Random | None = None) -> list[tuple[int, Frame]]:
    """Read a text; checks what stands in the cache after each pass. Returns (tokens, frame) of each."""
    positions: list[int] = []
    frame, passes = Frame(), []
    while len(positions) < prompt + new:
        start = len(positions)
        decoding = start >= prompt
        asked = 1 if decoding else min(prompt - start, pieces.randint(1, 100) if pieces else 10**6)
        count = frames.piece_of(start, asked)
        then = frames.next(frame, start, count, decoding=decoding)
        moves = frames.moves(frame, then, start)
        assert not moves or then != frame
        apply(moves, positions)
        frame = then
        assert positions == [frames.position(frame, key) for key in range(start)]
        assert start - frame.back == max(positions, default=-1) + 1, "the next position is the one after the last"
        positions += range(start - frame.back, start + count - frame.back)
        near = positions[frame.first_near :]
        assert len({*near}) == len(near) and positions == sorted(positions)
        assert not {*near} & {*positions[: frame.first_near]}
        for query in range(start, start + count):
            check_query(frames, frame, positions, query)
        passes.append((count, frame))
    return passes


def check_query(frames: Frames, frame: Frame, positions: list[int], query: int) -> None:
    group, neighbours = frames.group, frames.neighbours
    before = frame.query - query
    assert before >= 0
    found = [positions[query] - positions[key] for key in range(query + 1)]
    own = [distance(query, key, group, neighbours) for key in range(query + 1)]
    if before == 0 or frame.query < neighbours:
        assert found == own
        return
    fewer = [distance(query, key, group, neighbours - before) for key in range(query + 1)]
    far = max(0, query - (neighbours - before) + 1)
    assert found[far:] == fewer[far:] == [query - key for key in range(far, query + 1)]
    shift = {one - other for one, other in zip(found[:far], fewer[:far], strict=True)}
    assert len(shift) <= 1 and shift <= {-1, 0, 1}, "one and the same for all far keys"
    if before % group == 0:
        assert found == fewer


@pytest.mark.parametrize(("group", "neighbours"), CASES)
@pytest.mark.parametrize("usual", [False, True])
def test_distances_are_those_of_self_extend(group: int, neighbours: int, usual: bool) -> None:
    frames = usual_frames(group, neighbours) if usual else Frames(group, neighbours, 1, 1)
    for prompt in (1, neighbours - 1, neighbours, neighbours + 1, 3 * neighbours + 5, 230):
        passes = read(frames, max(prompt, 1), 2 * neighbours + 3, random.Random(prompt) if usual else None)
        if not usual:  # one token a frame where there are far keys: exact for all
            assert all(count == 1 for count, frame in passes if frame.query >= neighbours)


def test_pieces_and_answers_keep_most_neighbours() -> None:
    frames = usual_frames(8, 64)
    passes = read(frames, 500, 100)
    assert passes[0][0] == 64, "what has no far keys is read at once"
    assert {count for count, _ in passes[1:28]} == {16}
    assert len({frame for _, frame in passes[-100:]}) == 25, "four new tokens a frame"
    short = read(frames, 62, 10)
    assert [frame.query for _, frame in short[1:]] == [63, 63, 67, 67, 67, 67, 71, 71, 71, 71]


def test_moves_worked_by_hand() -> None:
    """Group 4, 6 neighbours: from the frame of place 9 to that of place 12, ten keys."""
    frames = Frames(4, 6, 5, 5)
    old, new = frames.at(9), frames.at(12)
    assert (old.first_near, old.back, new.first_near, new.back) == (4, 2, 7, 4)
    assert [frames.position(old, key) for key in range(10)] == [0, 0, 0, 0, 2, 3, 4, 5, 6, 7]
    assert [frames.position(new, key) for key in range(10)] == [0, 0, 0, 0, 1, 1, 1, 3, 4, 5]
    assert frames.moves(old, new, 10) == [Move(2, 3, -1), Move(3, 4, -2), Move(4, 5, -3), Move(5, 8, -2)]
    assert frames.moves(frames.at(3), frames.at(5), 4) == []


def test_sizes_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"neighbours = 1: .*at least 2"):
        Frames(2, 1, 1, 1)
    with pytest.raises(ValueError, match=r"piece = 16: use 1 to neighbours - 1 \(15\)"):
        Frames(2, 16, 16, 1)
    with pytest.raises(ValueError, match="ahead = 0"):
        Frames(2, 16, 1, 0)
