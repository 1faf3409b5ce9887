"""Text that jumps where positions do, in a store whose tokens are their own places: each says where it is from."""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from e2llm.config import load_recipe
from e2llm.data.parts import PackedWindows, TextPart
from e2llm.data.pieces import Jumps, piece_offsets
from e2llm.data.windows import WindowDataset
from e2llm.positions.placement import PlacementConfig, PositionSampler
from e2llm.positions.scales import ScalesConfig
from e2llm.train.trainer import JumpsOf

R = 32


def part_of(lengths: list[int], loss: np.ndarray | None = None) -> TextPart:
    """Documents of these lengths, token i of the store being i."""
    offsets = np.cumsum([0, *lengths])
    store: Any = SimpleNamespace(tokens=np.arange(offsets[-1], dtype=np.uint16), offsets=offsets, loss=loss)
    return TextPart.of(store, np.ones(len(lengths), dtype=bool), name="x", weight=1)


def jumps(places: list[int], steps: list[int], *, other: bool = False) -> Jumps:
    return Jumps(np.array(places), np.array(steps), other)


def test_jumps_are_where_positions_leave_some_out() -> None:
    found = Jumps.of(np.array([0, 1, 5, 6, 7, 100]), other_documents=False)
    assert found.places.tolist() == [2, 5] and found.steps.tolist() == [3, 92]
    assert len(Jumps.of(np.arange(7), other_documents=True)) == 0


def test_offsets_are_the_positions_own_or_share_the_room() -> None:
    two = jumps([4, 6], [10, 30])
    assert piece_offsets(two, 8, room=40).tolist() == [0, 0, 0, 0, 10, 10, 40, 40]
    assert piece_offsets(two, 8, room=20).tolist() == [0, 0, 0, 0, 5, 5, 20, 20]
    assert piece_offsets(two, 8, room=1).tolist() == [0, 0, 0, 0, 0, 0, 1, 1]


def test_pieces_of_a_long_document_stand_where_their_positions_say() -> None:
    """The window's tokens are their own places: they differ from the first one's as positions do."""
    windows = part_of([4000]).windows(R)
    sampler = PositionSampler(
        native_window=64, training_window=R, scales=ScalesConfig(max_scale=8), placement=PlacementConfig(), seed=3
    )
    moved = 0
    for number in range(40):
        positions = sampler.draw(number).positions
        window = windows.draw(number, 7, Jumps.of(positions, other_documents=False))
        first = int(window.tokens[0])
        assert first == windows.draw(number, 7).tokens[0]
        if first + positions[-1] < 4000:
            assert (window.tokens - first).tolist() == positions.tolist()
            moved += positions[-1] > R
        else:
            assert window.tokens[-1] == 3999, "all of the room is used"
        assert window.loss is None or not window.loss[Jumps.of(window.tokens, other_documents=False).places].any()
    assert moved > 10


def test_a_document_that_ends_in_the_window_stays_in_a_row() -> None:
    windows = part_of([20, 20, 24]).windows(R)
    one = windows.draw(0, 1, jumps([10], [5]))
    assert one.tokens.tolist() == windows.draw(0, 1).tokens.tolist() and one.loss is None
    exact = part_of([R, 40]).windows(R)[0]
    assert part_of([R, 40]).windows(R)._further_on(0, jumps([10], [5])).tokens.tolist() == exact.tokens.tolist()


def test_no_piece_leaves_its_document() -> None:
    windows = part_of([70, 90, 50]).windows(R)
    for number in range(60):
        tokens = windows.draw(number, 2, jumps([3, 20], [400, 7])).tokens
        edges = np.searchsorted([70, 160], tokens, side="right")
        in_a_row = np.array_equal(tokens, np.arange(tokens[0], tokens[0] + R))
        assert in_a_row or len(set(edges)) == 1


def test_pieces_of_other_documents_keep_their_place_in_the_window() -> None:
    windows = part_of([10 * R]).windows(R)
    window = windows.draw(4, 9, jumps([8, 20], [5, 5], other=True))
    first = windows.draw(4, 9).tokens
    assert window.tokens[:8].tolist() == first[:8].tolist()
    for low, high in ((8, 20), (20, R)):
        piece = window.tokens[low:high]
        assert piece.tolist() == list(range(piece[0], piece[0] + high - low)) and piece[0] % R == low
    assert window.loss is not None and np.flatnonzero(~window.loss).tolist() == [8, 20]
    again = windows.draw(4, 9, jumps([8, 20], [5, 5], other=True))
    assert again.tokens.tolist() == window.tokens.tolist(), "the same for the same draw"
    assert len({windows.draw(n, 9, jumps([8], [5], other=True)).tokens[8] for n in range(20)}) > 4


def test_tokens_keep_their_loss() -> None:
    loss = np.arange(400) % 3 == 0
    windows = PackedWindows(part_of([400], loss), R)
    for other in (False, True):
        window = windows.draw(1, 5, jumps([9], [64], other=other))
        wanted = window.tokens % 3 == 0
        wanted[9] = False
        assert window.loss is not None and window.loss.tolist() == wanted.tolist()


def test_a_dataset_draws_its_text_by_its_positions() -> None:
    sampler = PositionSampler(
        native_window=64, training_window=R, scales=ScalesConfig(max_scale=8), placement=PlacementConfig(), seed=3
    )
    of = pickle.loads(pickle.dumps(JumpsOf(sampler, False)))  # loaders' workers may get it so
    data = WindowDataset([part_of([60_000])], window=R, num_samples=30, seed=0, start=5, jumps=of)
    matched = 0
    for sample in (data[i] for i in range(30)):
        tokens, positions = sample["input_ids"].numpy(), sampler.draw(sample["sample_index"]).positions
        matched += (tokens - tokens[0]).tolist() == positions.tolist()
        assert (sample["labels"] == -100).sum() == len(Jumps.of(tokens, other_documents=False))
    assert matched >= 28, "but where the document ends"


@pytest.mark.parametrize("change", ["data.document_mask=true", "placement.kind=randpos", "placement.kind=none"])
def test_pieces_need_jumps_and_one_document(change: str) -> None:
    recipe = load_recipe("jumps", ["data.pieces=document"])
    assert recipe.data.pieces == "document"
    with pytest.raises(ValueError, match=r"data\.pieces = 'document': "):
        load_recipe("jumps", ["data.pieces=document", change])
