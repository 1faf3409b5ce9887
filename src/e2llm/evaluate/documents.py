"""Evaluation documents: text files become token arrays, no longer than needed.

One file is one document. Files are read and tokenized only as far as the largest window asks for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SUFFIXES = (".txt", ".md", ".py", ".tex", ".rst")
"""Files that a folder is searched for; a file that is named itself may end in anything."""
CHARACTERS_PER_TOKEN = 6
"""First guess of how much text holds the tokens wanted; doubled until it does."""


@dataclass(frozen=True)
class Document:
    """One text of a corpus."""

    name: str
    """Path inside the corpus folder."""
    tokens: np.ndarray
    """Token ids (T,) int32, without special tokens, cut at the length asked for."""

    @property
    def sha256(self) -> str:
        return hashlib.sha256(np.ascontiguousarray(self.tokens, dtype=np.int32).tobytes()).hexdigest()


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
    ValueError when the path holds no text, a file is no UTF-8, or no document is long enough (naming the longest).
    """
    root = Path(path)
    found: list[Document] = []
    longest, longest_name = 0, ""
    files = _files(root, suffixes)
    for file in files:
        name = file.name if root.is_file() else file.relative_to(root).as_posix()
        if not keep(name):
            continue
        tokens = _tokenize_prefix(_read(file), tokenizer, num_tokens)
        if len(tokens) > longest:
            longest, longest_name = len(tokens), name
        if len(tokens) >= num_tokens:
            found.append(Document(name, tokens))
            if len(found) == max_documents:
                break
    if not found:
        raise ValueError(
            f"{root}: none of {len(files)} documents has {num_tokens} tokens; the longest is "
            f"{longest_name or 'empty'} with {longest}. Lower the largest window or give longer documents"
        )
    return found


def _files(root: Path, suffixes: Sequence[str]) -> list[Path]:
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise ValueError(f"{root}: no such file or folder of evaluation documents")
    files = sorted(file for file in root.rglob("*") if file.suffix.lower() in suffixes and file.is_file())
    if not files:
        raise ValueError(f"{root}: no file ending in {', '.join(suffixes)}; name a file itself to use another kind")
    return files


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: no UTF-8 text at byte {error.start}: convert the file or leave it out") from error


def _tokenize_prefix(text: str, tokenizer: Any, num_tokens: int) -> np.ndarray:
    """First `num_tokens` tokens of `text`, fewer when it has no more.

    The text is cut ahead of tokenizing; 32 tokens more than wanted keep the cut from showing in the last ones.
    """
    characters = CHARACTERS_PER_TOKEN * (num_tokens + 32)
    while True:
        ids = tokenizer(text[:characters], add_special_tokens=False, verbose=False).input_ids
        if characters >= len(text) or len(ids) >= num_tokens + 32:
            return np.asarray(ids[:num_tokens], dtype=np.int32)
        characters *= 2
