"""A sample is a function of its absolute index; labels and position ids say what may be learned and seen."""

import pickle

import numpy as np
import pytest
import torch
from conftest import sentences
from torch.utils.data import DataLoader

from e2llm.data.parts import SyntheticPart, TextPart, Window
from e2llm.data.sources import Chat, Piece
from e2llm.data.tokens import build_store
from e2llm.data.windows import HeldOutWindows, WindowDataset, collate, to_sample

R = 32


def make_part(folder, name, tokenizer, lines, weight=1.0):
    pieces = [Piece(sentences(len(name) * 100 + i, count), True, True, False, 1) for i, count in enumerate(lines)]
    store = build_store(folder / name, pieces, tokenizer, name=name, advance=lambda size, tokens: None)
    return TextPart.of(store, np.ones(len(lines), dtype=bool), name=name, weight=weight)


@pytest.fixture(scope="module")
def parts(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("cache")
    return [
        make_part(folder, "a", tokenizer, [10, 20, 5], weight=3),
        make_part(folder, "bb", tokenizer, [40]),
        SyntheticPart("s", 1, "copies", tokenizer),
    ]


def equal(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(torch.as_tensor(one[k]), torch.as_tensor(other[k])) for k in one
    )


def test_samples_have_the_promised_shapes(parts):
    dataset = WindowDataset(parts, window=R, num_samples=20, seed=0)
    assert len(list(dataset)) == len(dataset) == 20
    batch = collate([dataset[i] for i in range(4)])
    assert {key: (tuple(value.shape), value.dtype) for key, value in batch.items()} == {
        "input_ids": ((4, R), torch.int64),
        "labels": ((4, R), torch.int64),
        "sample_index": ((4,), torch.int64),
    }
    assert batch["sample_index"].tolist() == [0, 1, 2, 3]
    assert torch.equal(batch["labels"], batch["input_ids"])


def test_a_resumed_dataset_goes_on_where_it_was(parts):
    whole = WindowDataset(parts, window=R, num_samples=300, seed=4)
    rest = WindowDataset(parts, window=R, num_samples=100, seed=4, start=200)
    assert len(rest) == 100
    assert all(equal(whole[200 + i], rest[i]) for i in range(100))
    other = WindowDataset(parts, window=R, num_samples=300, seed=5)
    assert not all(equal(whole[i], other[i]) for i in range(10))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # Python 3.12 on the way torch starts workers
@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_draw_the_same(parts, num_workers):
    dataset = WindowDataset(parts, window=R, num_samples=24, seed=4)
    loader = DataLoader(dataset, batch_size=8, collate_fn=collate, num_workers=num_workers)
    ids = torch.cat([batch["input_ids"] for batch in loader])
    assert torch.equal(ids, torch.stack([dataset[i]["input_ids"] for i in range(24)]))


def test_pickling_for_spawned_workers(parts):
    dataset = WindowDataset(parts, window=R, num_samples=5, seed=4)
    assert equal(pickle.loads(pickle.dumps(dataset))[3], dataset[3])


def test_sources_have_their_shares_and_all_windows_come_before_any_twice(parts):
    windows = [part.windows(R) for part in parts[:2]]
    owners = {w[i].tokens.tobytes(): number for number, w in enumerate(windows) for i in range(len(w))}
    count = len(windows[0])
    num_samples = count * 5 // 3
    dataset = WindowDataset(parts, window=R, num_samples=num_samples, seed=1)
    drawn = [sample["input_ids"].numpy().tobytes() for sample in dataset]
    shares = [sum(owners.get(tokens, 2) == source for tokens in drawn) for source in range(3)]
    assert shares == pytest.approx([num_samples * share for share in (0.6, 0.2, 0.2)], abs=1)
    of_first = [tokens for tokens in drawn if owners.get(tokens) == 0]
    assert len(set(of_first)) == min(len(of_first), count) > 5


def test_labels_follow_the_loss_flags():
    window = Window(np.arange(10, 16), np.array([0, 1, 1, 0, 0, 1], dtype=bool), np.array([0]))
    assert to_sample(window, 0, document_mask=False)["labels"].tolist() == [-100, 11, 12, -100, -100, 15]


def test_document_mask_restarts_positions_and_drops_first_targets():
    sample = to_sample(Window(np.arange(10, 18), None, np.array([2, 3, 6])), 9, document_mask=True)
    assert sample["position_ids"].tolist() == [0, 1, 0, 0, 1, 2, 0, 1]
    assert sample["position_ids"].dtype == torch.int64
    assert sample["labels"].tolist() == [10, 11, -100, -100, 14, 15, -100, 17]
    assert sample["input_ids"].tolist() == list(range(10, 18))


def test_position_ids_restart_after_each_eos(parts, tokenizer):
    dataset = WindowDataset(parts[:1], window=200, num_samples=3, seed=0, document_mask=True)
    restarts = 0
    for sample in dataset:
        expected, position = [], 0
        for token in sample["input_ids"].tolist():
            expected.append(position)
            position = 0 if token == tokenizer.eos_token_id else position + 1
        assert sample["position_ids"].tolist() == expected
        restarts += expected.count(0) - 1
    assert restarts > 0


def test_chat_windows_warn_about_what_they_leave_out(tmp_path, tokenizer, caplog):
    chat = Chat([{"role": "user", "content": "tree " * 90}, {"role": "assistant", "content": "house"}], "x", 1)
    store = build_store(tmp_path / "s", [chat, chat], tokenizer, name="x", advance=lambda size, tokens: None)
    part = TextPart.of(store, np.ones(2, dtype=bool), name="chats", weight=1)
    with pytest.raises(ValueError, match="chats: no assistant token in any window of 95"):
        first = TextPart.of(store, np.array([True, False]), name="chats", weight=1)
        WindowDataset([first], window=95, num_samples=1, seed=0)
    dataset = WindowDataset([part], window=16, num_samples=4, seed=0)
    assert "chats: " in caplog.text and "without assistant tokens are left out" in caplog.text
    assert all((sample["labels"][1:] != -100).any() for sample in dataset)


def test_too_little_text(parts):
    tokens = parts[0].num_tokens
    with pytest.raises(
        ValueError, match=rf"a: {tokens} tokens to train on \(in 3 documents\), a window needs {tokens + 1}"
    ):
        WindowDataset(parts, window=tokens + 1, num_samples=1, seed=0)
    with pytest.raises(
        ValueError, match=rf"held-out text is too short for a window of 9999 tokens \(a: {tokens}, bb: "
    ):
        HeldOutWindows(parts[:2], window=9999)
    with pytest.raises(ValueError, match=r"data\.sources is empty"):
        WindowDataset([], window=8, num_samples=1, seed=0)


def test_held_out_windows_come_once_in_order(parts):
    dataset = HeldOutWindows(parts[:2], window=R)
    windows = [part.windows(R) for part in parts[:2]]
    expected = [w[i].tokens.tolist() for w in windows for i in range(len(w))]
    assert [sample["input_ids"].tolist() for sample in dataset] == expected
    assert [sample["sample_index"] for sample in dataset] == list(range(len(expected)))


def test_held_out_limit_is_shared_and_spread(parts):
    counts = [len(part.windows(R)) for part in parts[:2]]
    dataset = HeldOutWindows(parts[:2], window=R, max_windows=7)
    assert dataset.entries == [(0, i * counts[0] // 3) for i in range(3)] + [(1, i * counts[1] // 4) for i in range(4)]
    assert len(HeldOutWindows(parts[:2], window=R, max_windows=10**6)) == sum(counts)


def test_a_source_without_a_held_out_window_is_named(parts, caplog):
    sizes = sorted(part.num_tokens for part in parts[:2])
    assert len(HeldOutWindows(parts[:2], window=sizes[0] + 1)) == 1
    assert f"{sizes[0]} held-out tokens fill no window of {sizes[0] + 1}" in caplog.text
