"""Evaluation documents: text files become token arrays, no longer than needed.

One file is one document. Files are read and tokenized only as far as the largest window asks for, however long they
are. Where much is asked for they are read a block at a time and their tokens lie in a file that is mapped into memory,
so that a document of millions of tokens takes no more than a short one.
"""

from __future__ import annotations

import codecs
import hashlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from e2llm.evaluate.writable import REMEDY, check_known

SUFFIXES = (".txt", ".md", ".py", ".tex", ".rst")
"""Files that a folder is searched for; a file that is named itself may end in anything."""
SAMPLE_CHARACTERS = 16_384
"""Text tokenized first, to learn how many characters a token of this document takes."""
FILES_TOGETHER = 16
"""Files tokenized in one call, at the most: tokenizers then use several cores."""
TOKENS_TOGETHER = 1 << 20
"""Tokens that one call gives, about, at the most."""
STREAM_TOKENS = 262_144
"""Documents wanted longer than this are tokenized a block at a time, one after the other."""
BLOCK_CHARACTERS = 1 << 20
"""Text held at once of such a document."""
CHECKED_CHARACTERS = 4096
"""Beginning of a document that is read back where its tokens do not say whether the tokenizer knows its text."""


@dataclass(frozen=True)
class Document:
    """One text of a corpus."""

    name: str
    """Path inside the corpus folder."""
    tokens: np.ndarray
    """Token ids (T,) int32, without special tokens, cut at the length asked for; of a long document mapped from a
    temporary file that goes with the array."""

    @property
    def sha256(self) -> str:
        return hashlib.sha256(np.ascontiguousarray(self.tokens, dtype=np.int32).data).hexdigest()


def load_documents(
    path: str | Path,
    tokenizer: Any,
    *,
    num_tokens: int,
    max_documents: int | None = None,
    keep: Callable[[str], bool] = lambda name: True,
    suffixes: Sequence[str] = SUFFIXES,
) -> list[Document]:
    """Documents under `path` (a file, or a folder and its folders) of at least `num_tokens` tokens, cut to those.

    Sorted by name; `keep` sees the name of each. With `max_documents` the first so many that are long enough. Raises
    ValueError when the path holds no text, a file is no UTF-8, no document is long enough (naming the longest), or the
    tokenizer cannot write one that would be used.
    """
    root = Path(path)
    files = document_files(root, suffixes)
    named = [(file, file.name if root.is_file() else file.relative_to(root).as_posix()) for file in files]
    named = [(file, name) for file, name in named if keep(name)]
    found: list[Document] = []
    longest, longest_name = 0, ""
    together = max(1, min(FILES_TOGETHER, TOKENS_TOGETHER // num_tokens)) if num_tokens <= STREAM_TOKENS else 1
    for start in range(0, len(named), together):
        group = named[start : start + together]
        if num_tokens > STREAM_TOKENS:
            arrays = [stream_tokens(file, tokenizer, num_tokens) for file, _ in group]
        else:
            arrays = _tokenize_prefixes([file for file, _ in group], tokenizer, num_tokens)
        for (file, name), tokens in zip(group, arrays, strict=True):
            if len(tokens) > longest:
                longest, longest_name = len(tokens), name
            if len(tokens) >= num_tokens and (max_documents is None or len(found) < max_documents):
                _check_known(file, name, tokens, tokenizer)
                found.append(Document(name, tokens))
        if max_documents is not None and len(found) == max_documents:
            return found
    if not found:
        raise ValueError(
            f"{root}: none of {len(named)} documents has {num_tokens} tokens; the longest is "
            f"{longest_name or 'empty'} with {longest}. Lower the largest window, give longer documents or, "
            "for retrieval, join several into one file"
        )
    return found


def _check_known(file: Path, name: str, tokens: np.ndarray, tokenizer: Any) -> None:
    with file.open(encoding="utf-8") as text:
        beginning = text.read(CHECKED_CHARACTERS)
    try:
        check_known(tokenizer, tokens, beginning)
    except ValueError as error:
        raise ValueError(f"document {name}: {error}; {REMEDY}") from error


def document_files(path: str | Path, suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
    """The file, or those of a folder and its folders, by name. ValueError where there is none."""
    root = Path(path)
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise ValueError(f"{root}: no such file or folder of evaluation documents; correct the path")
    files = sorted(file for file in root.rglob("*") if file.suffix.lower() in suffixes and file.is_file())
    if not files:
        raise ValueError(f"{root}: no file ending in {', '.join(suffixes)}; name a file itself to use another kind")
    return files


def _read(file: Path, characters: int) -> str:
    """The text's beginning."""
    try:
        with file.open(encoding="utf-8") as text:
            return text.read(characters)
    except UnicodeDecodeError as error:
        raise _no_text(file) from error


def _no_text(file: Path) -> ValueError:
    """Says where the file is no UTF-8: a reader by pieces knows the place inside its piece alone."""
    decoder, block = codecs.getincrementaldecoder("utf-8")(), b"begin"
    with file.open("rb") as data:
        while block:
            begun = len(decoder.getstate()[0])  # bytes of a letter that the block before ended in
            block = data.read(BLOCK_CHARACTERS)
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                place = data.tell() - len(block) - begun + error.start
                return ValueError(f"{file}: no UTF-8 text at byte {place}: convert the file or leave it out")
    return ValueError(f"{file}: no UTF-8 text: convert the file or leave it out")


def stream_tokens(
    file: Path, tokenizer: Any, num_tokens: int, *, block_characters: int = BLOCK_CHARACTERS
) -> np.ndarray:
    """First `num_tokens` tokens (T,) int32 of a file, mapped; one block of text and its tokens are held at a time.

    A block ends with a line's last character and the next one begins with the line break: most tokenizers begin a new
    word there, so that the tokens are those of the whole text.
    """
    count, rest = 0, ""
    with tempfile.TemporaryFile() as store, file.open(encoding="utf-8") as text:
        while count < num_tokens:
            try:
                read = text.read(block_characters)
            except UnicodeDecodeError as error:
                raise _no_text(file) from error
            if not read and not rest:
                break
            block, rest = _cut(rest + read, 8 * block_characters) if read else (rest, "")
            ids = np.asarray(tokenizer(block, add_special_tokens=False, verbose=False).input_ids, dtype=np.int32)
            ids = ids[: num_tokens - count]
            store.write(ids.tobytes())
            count += len(ids)
        store.flush()
        return np.memmap(store, dtype=np.int32, mode="r", shape=(count,)) if count else np.zeros(0, dtype=np.int32)


def _cut(text: str, longest: int) -> tuple[str, str]:
    """The text up to the last line's end, or the last word's where a line is long, without the space there, and the
    rest, which begins with that space. Text without any space is kept whole until it is `longest`."""
    for space in ("\n", " "):
        place = text.rfind(space)
        kept = text[:place].rstrip() if place > 0 else ""
        if kept:
            return kept, text[len(kept) :]
    return ("", text) if len(text) < longest else (text, "")


def _tokenize_prefixes(files: list[Path], tokenizer: Any, num_tokens: int) -> list[np.ndarray]:
    """First `num_tokens` tokens of each file, fewer where it has no more.

    A sample of each text says how far to read; a cut that held too few tokens is doubled. 32 tokens more than wanted
    keep the cut from showing in the last ones.
    """
    wanted = num_tokens + 32
    cut = dict.fromkeys(range(len(files)), SAMPLE_CHARACTERS)
    ids: dict[int, np.ndarray] = {}
    growth: dict[int, float] = {}
    waiting = list(cut)
    while waiting:
        texts = [_read(files[i], cut[i]) for i in waiting]
        found = tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
        ids |= {i: np.asarray(tokens[:wanted], dtype=np.int32) for i, tokens in zip(waiting, found, strict=True)}
        # A text that is shorter than its cut has ended.
        waiting = [
            i for i, text in zip(waiting, texts, strict=True) if len(text) == cut[i] and len(ids[i]) < wanted
        ]
        for i in waiting:
            growth[i] = 2.0 if i in growth else max(1.1, 1.1 * wanted / max(1, len(ids[i])))
            cut[i] = round(cut[i] * growth[i])
    return [ids[i][:num_tokens] for i in range(len(files))]
