"""Documents come out whole and in order, and whatever cannot be read is named with its file and line."""

import itertools

import pyarrow
import pyarrow.parquet
import pytest

from e2llm.config_sections import SourceConfig
from e2llm.data import sources
from e2llm.data.sources import Chat, Piece, find_files, read_files


def read(path, **options):
    source = SourceConfig(path=str(path), **options)
    return list(read_files(find_files(source), source))


def documents(items):
    """Texts of documents, put together from their pieces."""
    texts = []
    for item in items:
        assert isinstance(item, Piece)
        if item.is_first:
            texts.append("")
        texts[-1] += item.text
    return texts


def test_a_file_without_separator_is_one_document(write):
    assert documents(read(write("a.txt", "one\n\ntwo\n"))) == ["one\n\ntwo\n"]


def test_separator_lines_split_and_are_not_text(write):
    path = write("a.txt", "==\none\n==\r\n\n==\nt==wo\nlines\n==\n")
    assert documents(read(path, separator="==")) == ["one\n", "t==wo\nlines\n"]


def test_folder_is_read_by_path_order_and_glob(write):
    for name in ("b/z.py", "a.md", "b/c.txt", ".hidden/x.txt", "picture.png"):
        write(name, name)
    folder = write("z.txt", "z.txt").parent
    assert documents(read(folder)) == ["a.md", "b/c.txt", "b/z.py", "z.txt"]
    assert documents(read(folder, glob="**/*.py")) == ["b/z.py"]


def test_byte_order_mark_is_no_text(write):
    assert documents(read(write("a.txt", b"\xef\xbb\xbfone"))) == ["one"]
    assert documents(read(write("a.jsonl", b'\xef\xbb\xbf{"text": "one"}\n'))) == ["one"]


@pytest.mark.parametrize(
    "text", ["ab cd\n" * 300, "ab\n\n  cd\n" * 300, "\u00e9\u4e16" * 700, "\n" * 900 + "x", "\r\n" * 700 + "x"]
)
def test_long_documents_are_cut_without_loss(write, monkeypatch, text):
    monkeypatch.setattr(sources, "PIECE_BYTES", 64)
    for path in (write("a.txt", text + "==\n" + "short\n"), write("a.jsonl", [{"text": text}, {"text": "short\n"}])):
        items = read(path, separator="==")
        expected = [text, "short\n"] if path.suffix == ".jsonl" or text.endswith("\n") else [text + "==\nshort\n"]
        assert documents(items) == expected
        assert len(items) >= 8
        assert max(len(item.text.encode()) for item in items) <= 128
        for before, item in itertools.pairwise(items):
            assert item.is_first == before.is_last
            assert item.after_line_end == (not item.is_first and before.text.endswith("\n"))
    total = path.stat().st_size
    assert sum(item.size for item in items) == pytest.approx(total)


def test_cuts_prefer_a_line_end_with_text_around(write, monkeypatch):
    monkeypatch.setattr(sources, "PIECE_BYTES", 16)
    items = read(write("a.txt", "0123456789abcdef\n\n  indented\nplain\nmore\n" * 3))
    assert items[0].text == "0123456789abcdef\n\n  indented\n"


def test_jsonl_and_parquet_rows(write, tmp_path):
    rows = [{"text": "one", "id": 1}, {"text": "two", "id": 2}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert documents(read(tmp_path / "a.parquet")) == ["one", "two"]
    assert documents(read(write("a.jsonl", rows))) == ["one", "two"]
    assert documents(read(write("b.jsonl", '{"body": "x"}\n\n{"body": "y"}'), text_column="body")) == ["x", "y"]


def test_blank_rows_are_items_to_be_counted(write):
    assert documents(read(write("a.jsonl", [{"text": ""}, {"text": " \n"}, {"text": "x"}]))) == ["", "", "x"]


def test_chat_rows_drop_the_keys_that_other_rows_have(write, tmp_path):
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho", "name": "bot"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": chat, "text": "x"}]), tmp_path / "a.parquet")
    (item,) = read(tmp_path / "a.parquet")
    assert isinstance(item, Chat)
    assert item.messages == chat
    assert item.place.endswith("a.parquet, row 1")
    mixed = read(write("a.jsonl", [{"chat": chat}, {"text": "plain"}]), messages_column="chat")
    assert [type(item) for item in mixed] == [Chat, Piece]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"text": "a"}\n{"text": \n', r"a\.jsonl:2: not valid JSON: Expecting value"),
        ('{"text": "a"}\n[1]\n', r"a\.jsonl:2: holds list"),
        ('{"body": "a", "id": 1}\n', r"a\.jsonl:1: no column 'text'.* columns there: 'body', 'id'"),
        ('{"text": "a"}\n{"text": 7}\n', r"a\.jsonl:2: column 'text' holds 7"),
        ('{"text": null}\n', r"a\.jsonl:1: column 'text' holds None"),
        ('{"text": "\\ud800"}\n', r"a\.jsonl:1: column 'text' is no valid Unicode"),
        ('{"messages": "hi"}\n', r"a\.jsonl:1: column 'messages' holds 'hi'"),
        ('{"messages": []}\n', r"a\.jsonl:1: column 'messages' holds \[\]"),
        ('{"messages": [{"from": "user"}]}\n', r"a\.jsonl:1: messages\[0\] = .*role"),
        ('{"messages": [{"role": "user"}]}\n', r"a\.jsonl:1: messages\[0\] of role 'user' has no content"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', r"a\.jsonl:2: not UTF-8: byte 0xff at offset 24"),
    ],
)
def test_bad_rows_are_named(write, content, said):
    with pytest.raises(ValueError, match=said):
        read(write("a.jsonl", content))


def test_bad_bytes_are_named_by_line_and_offset(write, monkeypatch):
    monkeypatch.setattr(sources, "PIECE_BYTES", 16)
    good = "line \u00e9\n".encode() * 20 + b"==\n"
    with pytest.raises(ValueError, match=rf"a\.txt:23: not UTF-8: byte 0xe9 at offset {len(good) + 3} "):
        read(write("a.txt", good + b"ok\n" + b"\xe9\n"), separator="==")


def test_bad_parquet(write, tmp_path):
    with pytest.raises(ValueError, match=r"a\.parquet: not a readable Parquet file"):
        read(write("a.parquet", "no parquet at all"))
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"], "id": [1]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"b\.parquet: no column 'text'.* columns there: 'body', 'id'"):
        read(tmp_path / "b.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "c.parquet")
    with pytest.raises(ValueError, match=r"c\.parquet, row 1: column 'text' holds 1"):
        read(tmp_path / "c.parquet")


def test_paths_that_lead_nowhere(write, tmp_path):
    with pytest.raises(ValueError, match=r"missing\.txt.*no such file or folder"):
        read(tmp_path / "missing.txt")
    with pytest.raises(ValueError, match=r"extension '\.csv'.*\.jsonl"):
        read(write("a.csv", "x"))
    with pytest.raises(ValueError, match=r"no file in this folder ends in one of \.txt"):
        read(tmp_path)
    with pytest.raises(ValueError, match=r"no file in this folder matches glob '\*\.md'"):
        read(tmp_path, glob="*.md")
