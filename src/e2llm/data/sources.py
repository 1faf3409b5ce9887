"""Find and read the documents of a source, a piece at a time.

Flows in: a `SourceConfig`. Flows out: `Piece`s of text (a long document is cut after line ends) and `Chat`s, in order.
Knows no tokenizer. Memory is bounded by one piece of a text file, or a few rows of JSONL, Parquet or `datasets`.
Whatever cannot be read is a ValueError that names the file and the line, row or byte.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e2llm.config_sections import SourceConfig

TEXT_EXTENSIONS = (".txt", ".md", ".py")
EXTENSIONS = (*TEXT_EXTENSIONS, ".jsonl", ".parquet")
PIECE_BYTES = 64 * 1024
"""Documents longer than twice this are cut: tokenizers take ~100 bytes of memory a byte of text, one core a text."""

_CLEAN_CUT = re.compile(rb"\S\n(?=\S)")


@dataclass(frozen=True)
class Piece:
    """Part of one document; most documents are one piece."""

    text: str
    is_first: bool
    is_last: bool
    after_line_end: bool
    """The piece before it ended with a line end, which the tokenizer should see in front of this one."""
    size: float
    """How much of the source this was, for progress: bytes of a file, rows of a data set."""


@dataclass(frozen=True)
class Chat:
    """One conversation, always one document."""

    messages: list[dict[str, Any]]
    place: str
    """Where it stands ("file.jsonl:12"), for messages to the user."""
    size: float


Item = Piece | Chat


def find_files(source: SourceConfig) -> list[Path]:
    """Files of a local source, sorted by path. Without a glob: those of readable extensions, but nothing hidden."""
    path = Path(source.path).expanduser()
    if path.is_file():
        files = [path]
    elif path.is_dir():
        matches = sorted(file for file in path.glob(source.glob or "**/*") if file.is_file())
        files = matches if source.glob else [file for file in matches if _is_plain(file.relative_to(path))]
        if not files:
            wanted = f"matches glob {source.glob!r}" if source.glob else f"ends in one of {', '.join(EXTENSIONS)}"
            raise ValueError(f"data.sources.path = {source.path!r}: no file in this folder {wanted}")
    else:
        raise ValueError(f"data.sources.path = {source.path!r}: no such file or folder")
    for file in files:
        if file.suffix.lower() not in EXTENSIONS:
            raise ValueError(
                f"data.sources.path: {file} has extension {file.suffix!r}: supported are {', '.join(EXTENSIONS)}; "
                "rename the file, or choose others with data.sources.glob"
            )
    return files


def _is_plain(relative: Path) -> bool:
    return relative.suffix.lower() in EXTENSIONS and not any(part.startswith(".") for part in relative.parts)


def read_files(files: list[Path], source: SourceConfig) -> Iterator[Item]:
    """Every document of `files`, in order."""
    for file in files:
        suffix = file.suffix.lower()
        if suffix == ".jsonl":
            yield from _read_jsonl(file, source)
        elif suffix == ".parquet":
            yield from _read_parquet(file, source)
        else:
            yield from _read_text(file, source.separator)


def row_items(row: Mapping[str, Any], source: SourceConfig, place: str, size: float) -> Iterator[Item]:
    """The document of one row: a chat where the messages column holds something, else the text column."""
    messages = row.get(source.messages_column)
    if messages is not None:
        yield Chat(_checked_messages(messages, source.messages_column, place), place, size)
        return
    check_columns(row, source, place)
    text = row.get(source.text_column)
    if not isinstance(text, str):
        raise ValueError(f"{place}: column {source.text_column!r} holds {_short(text)}, a document is a string")
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place}: column {source.text_column!r} is no valid Unicode: {error.reason}") from None
    yield from _cut_document(data, place, size)


def check_columns(names: Collection[str], source: SourceConfig, place: str) -> None:
    """ValueError unless the text column or the messages column is among `names`."""
    if source.text_column not in names and source.messages_column not in names:
        raise ValueError(
            f"{place}: no column {source.text_column!r} (data.sources.text_column) and none {source.messages_column!r} "
            f"(data.sources.messages_column); columns there: {', '.join(map(repr, names)) or 'none'}"
        )


def _checked_messages(messages: object, column: str, place: str) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{place}: column {column!r} holds {_short(messages)}, a chat is a list of messages")
    checked = []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(
                f"{place}: {column}[{number}] = {_short(message)}: a message is {{'role': ..., 'content': ...}}"
            )
        # Columnar files fill the keys that other rows have with None; templates want them absent.
        kept = {key: value for key, value in message.items() if value is not None}
        if "content" not in kept and "tool_calls" not in kept:
            raise ValueError(f"{place}: {column}[{number}] of role {kept['role']!r} has no content")
        checked.append(kept)
    return checked


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _read_jsonl(file: Path, source: SourceConfig) -> Iterator[Item]:
    offset = 0
    with file.open("rb") as handle:
        for number, line in enumerate(handle, start=1):
            place = f"{file}:{number}"
            text = _decode(line, file, offset, number)
            offset += len(line)
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(f"{place}: not valid JSON: {error.msg} at column {error.colno}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{place}: holds {type(row).__name__}, a row is a JSON object")
            yield from row_items(row, source, place, len(line))


def _read_parquet(file: Path, source: SourceConfig) -> Iterator[Item]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            check_columns(names, source, str(file))
            wanted = [name for name in (source.messages_column, source.text_column) if name in names]
            size = file.stat().st_size / max(1, table.metadata.num_rows)
            number = 0
            for batch in table.iter_batches(batch_size=256, columns=wanted):
                for row in batch.to_pylist():
                    number += 1
                    yield from row_items(row, source, f"{file}, row {number}", size)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{file}: not a readable Parquet file: {error}") from None


def _read_text(file: Path, separator: str | None) -> Iterator[Piece]:
    """Documents of a text file: what stands between separator lines, or all of it. Blank stretches are no documents."""
    mark = separator.encode() if separator is not None else None
    with file.open("rb") as handle:
        cutter = _Cutter(file)
        # A limit, so that a file without line ends is not read whole.
        for line in iter(lambda: handle.readline(PIECE_BYTES), b""):
            if mark is not None and line.rstrip(b"\r\n") == mark:
                yield from cutter.finish()
                cutter.skip(line)
            else:
                yield from cutter.add(line)
        yield from cutter.finish()


def _cut_document(data: bytes, place: str, size: float) -> Iterator[Piece]:
    """One document held in memory, cut like those of a text file. Blank documents come out whole, to be counted."""
    cutter = _Cutter(place)
    pieces = [*cutter.add(data), *cutter.finish()]
    if not pieces:
        yield Piece("", True, True, False, size)
    for piece in pieces:
        yield Piece(piece.text, piece.is_first, piece.is_last, piece.after_line_end, size / len(pieces))


class _Cutter:
    """Bytes of one document after another -> `Piece`s; remembers where in the file it is."""

    def __init__(self, place: Path | str) -> None:
        self.place = place
        self.buffer = bytearray()
        self.offset = 0  # of the buffer's first byte in the file
        self.line = 1  # of the buffer's first byte, from 1
        self.is_first = True
        self.after_line_end = False

    def add(self, data: bytes) -> Iterator[Piece]:
        self.buffer += data
        while len(self.buffer) >= 2 * PIECE_BYTES:
            yield self._take(_cut_point(self.buffer), is_last=False)

    def finish(self) -> Iterator[Piece]:
        """End the document."""
        if self.buffer.strip() or not self.is_first:
            yield self._take(len(self.buffer), is_last=True)
        else:
            self.skip(bytes(self.buffer))
            self.buffer.clear()
        self.is_first, self.after_line_end = True, False

    def skip(self, data: bytes) -> None:
        self.offset += len(data)
        self.line += data.count(b"\n")

    def _take(self, length: int, is_last: bool) -> Piece:
        data = bytes(self.buffer[:length])
        text = _decode(data, self.place, self.offset, self.line)
        piece = Piece(text, self.is_first, is_last, self.after_line_end, length)
        self.skip(data)
        del self.buffer[:length]
        self.is_first, self.after_line_end = False, data.endswith(b"\n")
        return piece


def _cut_point(buffer: bytearray) -> int:
    """Where to cut: after a line end with text on both sides (tokens rarely join across it), else the next best."""
    found = _CLEAN_CUT.search(buffer, PIECE_BYTES, 2 * PIECE_BYTES)
    if found:
        return found.end()
    line_end = buffer.rfind(b"\n", PIECE_BYTES, 2 * PIECE_BYTES)
    if line_end >= 0:
        return line_end + 1
    cut = PIECE_BYTES
    while cut > PIECE_BYTES - 4 and buffer[cut] & 0xC0 == 0x80:  # inside a UTF-8 character
        cut -= 1
    return cut


def _decode(data: bytes, place: Path | str, offset: int, line: int) -> str:
    try:
        return data.decode("utf-8-sig" if offset == 0 else "utf-8")
    except UnicodeDecodeError as error:
        where = line + data[: error.start].count(b"\n")
        raise ValueError(
            f"{place}:{where}: not UTF-8: byte 0x{data[error.start]:02x} at offset {offset + error.start} of the file; "
            "convert the file to UTF-8"
        ) from None
