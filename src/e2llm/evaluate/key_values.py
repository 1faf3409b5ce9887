"""Key-value retrieval as in Lost in the Middle (Liu et al. 2023, arXiv 2307.03172, Sect. 3): a JSON object of random
UUIDs, the value of one key asked for.

`kv_pairs` makes objects that fill the window; with files (the paper's JSONL, plain or gzipped) it asks those, each
wherever it fits. The asked pair stands at each tenth of the object in turn.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from e2llm.evaluate.questions import Draft, Kind, Texts
from e2llm.evaluate.ruler.words import any_uuid

BODY = (
    "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n{data}\n\n"
    'Key: "{key}"'
)
ANSWER = "\nCorresponding value:"
ANSWER_TOKENS = 64
"""A UUID takes 20 to 45 tokens, by tokenizer."""
_MOST = 1_000_000

Pairs = Sequence[tuple[str, str]]


def generated(texts: Texts, random: np.random.Generator, window: int, index: int) -> Draft:
    """An object of as many pairs as fit."""
    made = [(any_uuid(random), any_uuid(random))]
    depth = (index % 10 + float(random.random())) / 10

    def body(size: int) -> str:
        while len(made) < size:
            made.append((any_uuid(random), any_uuid(random)))
        others = made[1:size]
        place = round(depth * len(others))
        return _body([*others[:place], made[0], *others[place:]], made[0][0])

    return Draft(body=body, answer_start=ANSWER, expected=(made[0][1],), most=_MOST, depths=(depth,), least=1)


def from_files(paths: Sequence[str]) -> Callable[[Texts, np.random.Generator, int, int], Draft]:
    """A maker over the objects of `paths`, in order; read and checked now."""
    objects = [pairs for path in paths for pairs in read_pairs(path)]

    def make(texts: Texts, random: np.random.Generator, window: int, index: int) -> Draft:
        pairs = list(objects[index % len(objects)])
        depth = (index % 10 + float(random.random())) / 10
        place = round(depth * (len(pairs) - 1))
        asked = int(random.integers(len(pairs)))
        pairs.insert(place, pairs.pop(asked))
        key, value = pairs[place]
        # An object is asked whole or not at all: its one size is the number of its pairs.
        return Draft(
            body=lambda size: _body(pairs, key),
            answer_start=ANSWER,
            expected=(value,),
            most=len(pairs),
            depths=(depth,),
            least=len(pairs),
            source=f"{len(pairs)} pairs",
        )

    return make


def read_pairs(path: str | Path) -> list[Pairs]:
    """Objects of a Lost-in-the-Middle file. Raises ValueError naming file and line for what is malformed."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"kv_files: {str(path)!r}: no such file")
    found: list[Pairs] = []
    opened = gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")
    with opened as lines:
        for number, line in enumerate(lines, start=1):
            try:
                pairs = [(str(key), str(value)) for key, value in json.loads(line)["ordered_kv_records"]]
            except (ValueError, KeyError, TypeError, OSError) as error:
                raise ValueError(
                    f"{path}: line {number}: needs ordered_kv_records, a list of pairs; {error!r}"
                ) from error
            if len(pairs) < 2:
                raise ValueError(f"{path}: line {number}: {len(pairs)} pairs; a question needs at least two")
            found.append(pairs)
    if not found:
        raise ValueError(f"{path}: holds no objects")
    return found


def _body(pairs: Pairs, key: str) -> str:
    rows = ",\n ".join(f'"{name}": "{value}"' for name, value in pairs)
    return BODY.format(data="{" + rows + "}", key=key)


def kv_kind(paths: Sequence[str] = ()) -> Kind:
    """The kind; with files, over their objects."""
    return Kind(
        name="kv_pairs",
        make=from_files(paths) if paths else generated,
        answer_tokens=ANSWER_TOKENS,
        suite="kv_pairs",
        metric="retrieval",
        wording=BODY + ANSWER,
    )
