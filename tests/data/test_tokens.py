"""A store holds the tokenizer's own ids, and a folder with a store's name is always whole."""

import json
import os
import pickle
import time

import numpy as np
import pytest
from conftest import EOS, make_tokenizer, sentences

from e2llm.data import sources, tokens
from e2llm.data.sources import Chat, Piece
from e2llm.data.tokens import TokenStore, build_store, check_tokenizer

CHAT = [{"role": "user", "content": "tree"}, {"role": "assistant", "content": "house"}]


def whole(text):
    return Piece(text, True, True, False, len(text))


def build(folder, items, tokenizer):
    return build_store(folder / "store", items, tokenizer, name="x", advance=lambda size, tokens: None)


def ids_of(store):
    """Token ids of each document."""
    return [store.tokens[a:b].tolist() for a, b in zip(store.offsets, store.offsets[1:], strict=False)]


def test_documents_are_the_tokenizers_ids_and_eos(tmp_path, tokenizer):
    texts = [sentences(i, 20) for i in range(5)]
    store = build(tmp_path, map(whole, texts), tokenizer)
    assert ids_of(store) == [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in texts]
    assert store.tokens.dtype == np.uint16
    assert store.meta.num_tokens == len(store.tokens)
    assert store.loss is None


def test_bos_is_added_where_the_tokenizer_does(tmp_path, bos_tokenizer):
    (ids,) = ids_of(build(tmp_path, [whole("the tree")], bos_tokenizer))
    assert (ids[0], ids[-1]) == (bos_tokenizer.bos_token_id, bos_tokenizer.eos_token_id)
    assert ids[1:-1] == bos_tokenizer("the tree", add_special_tokens=False).input_ids


def test_eos_is_not_doubled(tmp_path, tokenizer):
    (ids,) = ids_of(build(tmp_path, [whole("tree" + EOS)], tokenizer))
    assert ids.count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize("name", ["tokenizer", "bos_tokenizer"])
@pytest.mark.parametrize("text", [sentences(1, 300), "tree\n\n  house\n" * 300])
def test_cut_documents_have_the_ids_of_whole_ones(tmp_path, request, write, monkeypatch, name, text):
    monkeypatch.setattr(sources, "PIECE_BYTES", 256)
    tokenizer = request.getfixturevalue(name)
    path = write("a.txt", text)
    pieces = list(sources._read_text(path, None))
    assert len(pieces) > 5
    (ids,) = ids_of(build(tmp_path, pieces, tokenizer))
    assert ids == [*tokenizer(text).input_ids, tokenizer.eos_token_id]


def test_wide_ids_for_large_vocabularies(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(type(tokenizer), "get_vocab", lambda self: {"last": 2**16})
    assert build(tmp_path, [whole("tree")], tokenizer).tokens.dtype == np.uint32


def test_blank_documents_are_counted_and_left_out(tmp_path, tokenizer):
    meta = build(tmp_path, [whole(""), whole("tree"), whole(" \n")], tokenizer).meta
    assert (meta.num_documents, meta.num_empty_documents) == (1, 2)


def test_loss_flags_only_once_a_chat_appears(tmp_path, tokenizer):
    store = build(tmp_path, [whole("tree"), Chat(CHAT, "x:1", 1), whole("house")], tokenizer)
    first, chat, last = (store.loss[a:b] for a, b in zip(store.offsets, store.offsets[1:], strict=False))
    assert first.all() and last.all()
    ids = ids_of(store)[1]
    # All but the EOS we add is the template's; it ends an answer, so it is learned.
    assert tokenizer.decode([i for i, flag in zip(ids, chat, strict=True) if flag]) == f"house<|im_end|>\n{EOS}"


def test_equal_content_has_equal_hashes(tmp_path, tokenizer):
    items = [whole("tree"), whole("house"), whole("tree"), Chat(CHAT, "x:1", 1), Chat(CHAT[::1], "x:2", 1)]
    hashes = build(tmp_path, items, tokenizer).hashes.tolist()
    assert hashes[0] == hashes[2] and hashes[3] == hashes[4]
    assert len(set(hashes)) == 3


def test_an_error_leaves_nothing_behind(tmp_path, tokenizer):
    def broken():
        yield whole("tree")
        yield Chat(CHAT, "x:1", 1)  # ends the first batch, so that something is written
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, broken(), tokenizer)
    assert list(tmp_path.iterdir()) == []
    assert build(tmp_path, [whole("tree")], tokenizer).meta.num_documents == 1


def test_no_documents(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="'x': no text in it \\(1 blank"):
        build(tmp_path, [whole(" ")], tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_the_loser_of_a_race_takes_the_winners_store(tmp_path, tokenizer):
    def slow():
        yield whole("tree")
        build(tmp_path, [whole("tree")], tokenizer)  # another process, meanwhile
        (tmp_path / "store" / "winner").touch()

    store = build(tmp_path, slow(), tokenizer)
    assert (store.folder / "winner").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_abandoned_builds_are_removed_and_fresh_ones_are_not(tmp_path, tokenizer):
    for name, age in (("building-old-1-0", 2 * tokens._ABANDONED_SECONDS), ("building-new-1-0", 0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokens.bin").touch()
        for path in (tmp_path / name / "tokens.bin", tmp_path / name):
            os.utime(path, (time.time() - age,) * 2)
    build(tmp_path, [whole("tree")], tokenizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["building-new-1-0", "store"]


def test_damage_is_noticed(tmp_path, tokenizer):
    folder = build(tmp_path, [whole("tree")], tokenizer).folder
    (folder / "tokens.bin").write_bytes(b"12")
    with pytest.raises(ValueError, match=r"tokens\.bin of the token cache is damaged .*delete"):
        TokenStore.open(folder)


def test_stores_travel_to_workers_without_their_arrays(tmp_path, tokenizer):
    store = build(tmp_path, [whole(sentences(0, 2000))], tokenizer)
    assert len(store.tokens) > 5000
    packed = pickle.dumps(store)
    assert len(packed) < 1000
    assert (pickle.loads(packed).tokens == store.tokens).all()


def test_meta_is_json_that_describes_the_files(tmp_path, tokenizer):
    store = build(tmp_path, [whole("tree")], tokenizer)
    meta = json.loads((store.folder / "meta.json").read_text())
    assert meta["num_tokens"] * 2 == (store.folder / "tokens.bin").stat().st_size


def test_long_documents_raise_no_warning_about_the_models_window(tmp_path):
    tokenizer = make_tokenizer()
    build(tmp_path, [whole(sentences(0, 100)), Chat(CHAT * 20, "x:1", 1)], tokenizer)
    # transformers notes here that it has warned
    assert not tokenizer.deprecation_warnings
    tokenizer(sentences(0, 100))
    assert tokenizer.deprecation_warnings


def test_tokenizers_without_eos_are_refused():
    with pytest.raises(ValueError, match=r"no EOS token.*set tokenizer\.eos_token"):
        check_tokenizer(make_tokenizer(eos_token=None))
