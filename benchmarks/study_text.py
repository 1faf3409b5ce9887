"""Text that a study trains on and measures: files of a folder, or the quickstart's.

Flows in: what --text names. Flows out: `data.sources` of a recipe, and documents by corpus. Knows no recipe and no
model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from e2llm.evaluate.documents import Document, load_documents
from e2llm.quickstart import FACTS_SHARE, join_documents, sources, texts, write_text

STDLIB = "stdlib"
"""The --text that is no folder."""


class Text(Protocol):
    """What a study reads."""

    def sources(self, planted: float | None, sets: int | None) -> str:
        """`data.sources` as TOML; `planted`: the share of windows with planted facts, `sets`: the most sets of them in
        one; None for the text's own."""

    def documents(self, tokenizer: Any, num_tokens: int) -> dict[str, list[Document]]:
        """Corpus -> documents to measure on, of at least `num_tokens` tokens."""


class FolderText:
    """train/*.txt (documents separated by a line <|endoftext|>) and dev/<corpus>/*.txt."""

    def __init__(self, folder: Path, files: Sequence[Path] | None = None) -> None:
        self.folder = folder
        self.files = sorted((folder / "train").glob("*.txt")) if files is None else list(files)
        if not self.files:
            raise ValueError(f"text = {str(folder)!r}: no train/*.txt there; name a folder that has them, or {STDLIB}")

    def sources(self, planted: float | None, sets: int | None) -> str:
        """Every file by its size; facts are planted into that share of each one's windows (default 0), up to 4 sets of
        them in one where no number is given."""
        more = f', separator="<|endoftext|>", planted={planted or 0.0}'
        more += f", planted_sets={4 if sets is None else sets}" if planted else ""
        return "[" + ", ".join(
            f"{{path={json.dumps(str(file))}, weight={file.stat().st_size}{more}}}" for file in self.files
        ) + "]"  # fmt: skip

    def documents(self, tokenizer: Any, num_tokens: int) -> dict[str, list[Document]]:
        """A corpus for each folder in dev/."""
        folders = sorted((self.folder / "dev").iterdir())
        return {one.name: load_documents(one, tokenizer, num_tokens=num_tokens) for one in folders}


class StdlibText:
    """The quickstart's: the running Python's standard library, its held-out files, its passages with planted facts."""

    def __init__(self, folder: Path) -> None:
        """`folder`: where the two training files are written."""
        training, self.held_out = texts()
        folder.mkdir(parents=True, exist_ok=True)
        self.files = write_text(training, folder)

    def sources(self, planted: float | None, sets: int | None) -> str:
        """Library and planted passages; `planted`: the latter's share of the windows (default: the quickstart's).
        Raises ValueError for `sets`: the passages are made beforehand."""
        if sets is not None:
            raise ValueError(f"planted_sets = {sets}: of a folder's text; --text {STDLIB} has passages of its own")
        return sources(self.files, FACTS_SHARE if planted is None else planted)

    def documents(self, tokenizer: Any, num_tokens: int) -> dict[str, list[Document]]:
        """The quickstart's eight documents."""
        return {"python": join_documents(tokenizer, self.held_out, num_tokens=num_tokens)}


def open_text(name: str, work: Path) -> Text:
    """The text that --text names; `work`: the study's folder. Raises ValueError where there is none."""
    return StdlibText(work / "text") if name == STDLIB else FolderText(Path(name))
