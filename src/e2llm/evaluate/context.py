"""What every protocol is measured with: the loaded model, the texts, the settings, the labels of its rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from e2llm.evaluate.config import EvaluateConfig
from e2llm.evaluate.documents import Document
from e2llm.evaluate.logits import TokenScorer
from e2llm.evaluate.partial import Kept
from e2llm.evaluate.ranks import Ranks
from e2llm.infer import Engine

Results = dict[str, list[dict[str, Any]]]
"""`rows` and `examples` of a part."""


@dataclass(frozen=True)
class Part:
    """One combination that is measured and kept as a whole."""

    corpus: str
    protocol: str
    window: int
    scale: float

    def __str__(self) -> str:
        return f"{self.corpus} {self.protocol} window {self.window} scale {self.scale:g}"


class Context(Protocol):
    """`measure.Measurement`, as the protocols see it."""

    engine: Engine
    corpora: Mapping[str, Sequence[Document]]
    config: EvaluateConfig
    labels: dict[str, Any]
    first_token: int | None
    scorer: TokenScorer | None
    ranks: Ranks
    memory: dict[Any, Any]
    """What parts share and is costly to find: running text, key tokens."""

    def kept(self, part: Part) -> Kept:
        """Where single results of the part are kept while it is measured."""
