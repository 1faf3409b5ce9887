"""Ordinary text -> packed training windows. Only what is listed here is meant for other packages."""

from e2llm.data.corpus import Corpus, build_corpus, check_sources
from e2llm.data.parts import SyntheticPart, TextPart
from e2llm.data.pieces import Jumps
from e2llm.data.tokens import TokenStore
from e2llm.data.windows import HeldOutWindows, WindowDataset, collate

__all__ = [
    "Corpus",
    "HeldOutWindows",
    "Jumps",
    "SyntheticPart",
    "TextPart",
    "TokenStore",
    "WindowDataset",
    "build_corpus",
    "check_sources",
    "collate",
]
