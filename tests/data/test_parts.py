"""Windows tile the packed documents; nothing is read twice, skipped or taken from the other part."""

import numpy as np
import pytest
from conftest import sentences

from e2llm.data.parts import SyntheticPart, TextPart, find_generator
from e2llm.data.sources import Chat, Piece
from e2llm.data.tokens import build_store


@pytest.fixture(scope="module")
def store(tmp_path_factory, tokenizer):
    pieces = [Piece(sentences(i, 3 + i), True, True, False, 1) for i in range(12)]
    folder = tmp_path_factory.mktemp("cache") / "store"
    return build_store(folder, pieces, tokenizer, name="x", advance=lambda size, tokens: None)


def stream(store, chosen):
    """Plain version: the chosen documents one after another, and where each begins."""
    documents = [store.tokens[store.offsets[d] : store.offsets[d + 1]] for d in np.flatnonzero(chosen)]
    starts = np.cumsum([0, *(len(document) for document in documents)])[:-1]
    return np.concatenate(documents), starts


CHOICES = ["111111111111", "011010001110", "000000000001", "100000000000", "101010101010"]


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("window", [8, 33, 64])
def test_windows_tile_the_stream(store, choice, window):
    chosen = np.array([flag == "1" for flag in choice])
    part = TextPart.of(store, chosen, name="x", weight=1)
    packed, starts = stream(store, chosen)
    assert part.num_tokens == len(packed)
    assert part.num_documents == chosen.sum()
    windows = part.windows(window)
    assert len(windows) == len(packed) // window
    for number in range(len(windows)):
        low, high = number * window, (number + 1) * window
        cut = windows[number]
        assert cut.tokens.tolist() == packed[low:high].tolist()
        assert cut.document_starts.tolist() == [s - low for s in starts if low <= s < high]
        assert cut.loss is None


def test_every_epoch_visits_all_windows_in_its_own_order(store):
    windows = TextPart.of(store, np.ones(12, dtype=bool), name="x", weight=1).windows(32)
    count = len(windows)
    epochs = [[windows.draw(epoch * count + i, seed=5).tokens.tobytes() for i in range(count)] for epoch in range(2)]
    every = sorted(windows[i].tokens.tobytes() for i in range(count))
    assert sorted(epochs[0]) == sorted(epochs[1]) == every
    assert epochs[0] != epochs[1]
    assert epochs[0] != [windows.draw(i, seed=6).tokens.tobytes() for i in range(count)]


def test_windows_without_a_token_to_learn_are_left_out(tmp_path, tokenizer):
    chats = [
        Chat([{"role": "user", "content": "tree " * length}, {"role": "assistant", "content": "house"}], "x", 1)
        for length in (200, 1, 1, 150)
    ]
    store = build_store(tmp_path / "s", chats, tokenizer, name="x", advance=lambda size, tokens: None)
    part = TextPart.of(store, np.ones(4, dtype=bool), name="x", weight=1)
    first_alone = 0
    for window in range(8, 40):
        cuts = store.loss[: len(store.loss) // window * window].reshape(-1, window).astype(bool)
        by_hand = [cut.tolist() for cut in cuts if cut[1:].any()]
        windows = part.windows(window)
        assert 0 < len(windows) == len(by_hand) < len(cuts)
        assert [windows[i].loss.tolist() for i in range(len(windows))] == by_hand
        assert windows.num_unusable == len(cuts) - len(windows)
        first_alone += sum(cut[0] and not cut[1:].any() for cut in cuts)
    assert first_alone, "no window tried the token that nothing predicts"


def test_synthetic_windows_are_passages_between_eos(tokenizer):
    windows = SyntheticPart("s", 1, "key_values", tokenizer).windows(3000)
    cut = windows.draw(3, seed=1)
    assert cut.tokens.shape == (3000,)
    assert cut.document_starts[0] == 0 and len(cut.document_starts) > 1
    assert (cut.tokens[cut.document_starts[1:] - 1] == tokenizer.eos_token_id).all()
    assert (cut.tokens == windows.draw(3, seed=1).tokens).all()
    for other in (windows.draw(4, seed=1), windows.draw(3, seed=2)):
        assert (cut.tokens != other.tokens).any()


def test_unknown_generator():
    with pytest.raises(ValueError, match=r"data\.sources\.synthetic = 'poems': no such generator; there are copies"):
        find_generator("poems")
