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
SAMPLE_CHARACTERS = 16_384
"""Text tokenized first, to learn how many characters a token of this document takes."""
FILES_TOGETHER = 16
"""Files tokenized in one call: tokenizers then use several cores."""


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
    files = _files(root, suffixes)
    named = [(file, file.name if root.is_file() else file.relative_to(root).as_posix()) for file in files]
    named = [(file, name) for file, name in named if keep(name)]
    found: list[Document] = []
    longest, longest_name = 0, ""
    for start in range(0, len(named), FILES_TOGETHER):
        group = named[start : start + FILES_TOGETHER]
        arrays = _tokenize_prefixes([_read(file) for file, _ in group], tokenizer, num_tokens)
        for (_, name), tokens in zip(group, arrays, strict=True):
            if len(tokens) > longest:
                longest, longest_name = len(tokens), name
            if len(tokens) >= num_tokens:
                found.append(Document(name, tokens))
        if max_documents is not None and len(found) >= max_documents:
            return found[:max_documents]
    if not found:
        raise ValueError(
            f"{root}: none of {len(named)} documents has {num_tokens} tokens; the longest is "
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


def _tokenize_prefixes(texts: list[str], tokenizer: Any, num_tokens: int) -> list[np.ndarray]:
    """First `num_tokens` tokens of each text, fewer where it has no more.

    A sample of each text says how far to read; a cut that held too few tokens is doubled. 32 tokens more than wanted
    keep the cut from showing in the last ones.
    """
    wanted = num_tokens + 32

    def encode(cut: dict[int, int]) -> dict[int, list[int]]:
        ids = tokenizer([texts[i][:end] for i, end in cut.items()], add_special_tokens=False, verbose=False).input_ids
        return dict(zip(cut, ids, strict=True))

    cut = {i: min(SAMPLE_CHARACTERS, len(text)) for i, text in enumerate(texts)}
    ids = encode(cut)
    growth = {i: 1.1 * wanted / max(1, len(tokens)) for i, tokens in ids.items()}
    while waiting := [i for i, text in enumerate(texts) if cut[i] < len(text) and len(ids[i]) < wanted]:
        cut |= {i: min(len(texts[i]), round(cut[i] * max(growth[i], 1.1))) for i in waiting}
        ids |= encode({i: cut[i] for i in waiting})
        growth = dict.fromkeys(cut, 2.0)
    return [np.asarray(ids[i][:num_tokens], dtype=np.int32) for i in range(len(texts))]
