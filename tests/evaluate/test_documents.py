"""Documents from files: cut exactly where the full tokenization would be, and errors that say what is too short."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest
from ruler_texts import word_tokenizer
from texts import character_tokenizer

from e2llm.evaluate import documents
from e2llm.evaluate.documents import load_documents, stream_tokens

TOKENIZER = character_tokenizer()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "part").mkdir()
    (tmp_path / "b.txt").write_text("short")
    (tmp_path / "a.txt").write_text("A" * 100)
    (tmp_path / "part" / "c.py").write_text("def f():\n" * 20)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    return tmp_path


def test_folder_gives_long_documents_by_name_cut_to_length(folder: Path) -> None:
    found = load_documents(folder, TOKENIZER, num_tokens=50)
    assert [document.name for document in found] == ["a.txt", "part/c.py"]
    assert all(len(document.tokens) == 50 for document in found)
    assert found[1].tokens.tolist() == [ord(c) for c in ("def f():\n" * 20)[:50]]
    assert found[0].sha256 != found[1].sha256
    assert len(load_documents(folder, TOKENIZER, num_tokens=50, max_documents=1)) == 1
    kept = load_documents(folder, TOKENIZER, num_tokens=50, keep=lambda name: name.endswith(".py"))
    assert [document.name for document in kept] == ["part/c.py"]


def test_only_a_prefix_is_tokenized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("e2llm.evaluate.documents.SAMPLE_CHARACTERS", 100)
    seen: list[int] = []

    def counting(texts: list[str], **options: object) -> object:
        seen.extend(map(len, texts))
        return TOKENIZER(texts, **options)

    for i in range(20):
        (tmp_path / f"{i:02d}.txt").write_text("x" * 100_000)
    found = load_documents(tmp_path, counting, num_tokens=968, max_documents=3)
    assert seen == [100] * 16 + [1100] * 16  # one group of files, not twenty; one character a token
    assert [document.name for document in found] == ["00.txt", "01.txt", "02.txt"]


def test_text_whose_tokens_grow_longer_is_read_further(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token is a word: the sample holds short ones, the rest long ones, and the result is that of the whole text."""
    monkeypatch.setattr("e2llm.evaluate.documents.SAMPLE_CHARACTERS", 100)

    class Words:
        def __call__(self, texts: list[str], **options: object) -> Words:
            self.input_ids = [[int(word) for word in text.split()] for text in texts]
            return self

    numbers = [*range(50), *range(10**8, 10**8 + 5000)]
    (tmp_path / "numbers.txt").write_text(" ".join(map(str, numbers)))
    (tmp_path / "short.txt").write_text("1 2 3")
    found = load_documents(tmp_path, Words(), num_tokens=1200)
    assert [document.name for document in found] == ["numbers.txt"]
    assert found[0].tokens.tolist() == numbers[:1200]


def test_nothing_long_enough_names_the_longest(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"none of 3 documents has 500 tokens; the longest is part/c\.py with 180"):
        load_documents(folder, TOKENIZER, num_tokens=500)


def test_paths_without_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file or folder"):
        load_documents(tmp_path / "absent", TOKENIZER, num_tokens=5)
    with pytest.raises(ValueError, match="no file ending in"):
        load_documents(tmp_path, TOKENIZER, num_tokens=5)
    (tmp_path / "bad.txt").write_bytes(b"abc\xff")
    with pytest.raises(ValueError, match=r"bad\.txt: no UTF-8 text at byte 3"):
        load_documents(tmp_path, TOKENIZER, num_tokens=1)


@pytest.mark.parametrize("block_characters", [50, 997, 10_000])
def test_streamed_tokens_are_those_of_the_whole_text(tmp_path: Path, block_characters: int) -> None:
    tokenizer = word_tokenizer()
    text = Path(argparse.__file__).read_text()[:20_000] + "\n\n \nno end of line"
    file = tmp_path / "long.txt"
    file.write_text(text)
    expected = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    found = stream_tokens(file, tokenizer, 10**6, block_characters=block_characters)
    assert isinstance(found, np.memmap) and found.tolist() == expected
    assert stream_tokens(file, tokenizer, 100, block_characters=block_characters).tolist() == expected[:100]


def test_long_documents_are_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "STREAM_TOKENS", 500)
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("one word a line\n" * 100)
    (tmp_path / "short.txt").write_text("one\n")
    (tmp_path / "empty.txt").write_text("")
    found = load_documents(tmp_path, character_tokenizer(), num_tokens=1000)
    assert [d.name for d in found] == ["a.txt", "b.txt"]
    assert all(isinstance(d.tokens, np.memmap) and len(d.tokens) == 1000 for d in found)
    monkeypatch.setattr(documents, "STREAM_TOKENS", 10**6)
    whole = load_documents(tmp_path, character_tokenizer(), num_tokens=1000)
    assert [d.sha256 for d in found] == [d.sha256 for d in whole]
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe")
    monkeypatch.setattr(documents, "STREAM_TOKENS", 500)
    with pytest.raises(ValueError, match="no UTF-8 text"):
        load_documents(tmp_path, character_tokenizer(), num_tokens=1000)
