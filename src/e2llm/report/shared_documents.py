"""One text for all values that stand side by side: perplexity on the documents that every Record measured.

Flows in: Records, and their rows in the groups that a table shows together. Flows out: the same rows. Where Records of
a group read different documents at a window, values, counts and intervals are made again from the documents that all
of them read; a row that cannot be put on those keeps its value and gets a mark. Knows no table and no figure.

Documents are the same where the SHA-256 of their tokens and their number of target tokens are; names may differ.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from e2llm.intervals import interval_fields, interval_of_perplexity
from e2llm.records import INTERVAL_FIELDS, Record
from e2llm.report.formats import format_count, format_window, sentence_case

Row = dict[str, Any]
Key = tuple[str, int, int]
"""SHA-256, target tokens, and which of several such documents (a corpus may hold one text twice)."""
Documents = dict[Key, tuple[str, float]]
"""What a row sums up: a document's name and nats, in the order of the Record."""

COMPARISON = "comparison"
"""Key of a row that holds its `Comparison`; no label."""
_PART = ("corpus", "protocol", "window", "scale")
"""Labels that a row and its examples share."""
_MARKS = "†‡§¶"
_MOST_NAMES = 6
_OTHERS = "on other documents, or other tokens of them"
_UNKNOWN = "on documents that the Record holds no values of, perhaps others"
_NOT_COMPARABLE = "not to be compared with values of another mark or none"


@dataclass(frozen=True)
class Comparison:
    """What a row stands for where Records differ in their documents.

    Either its value is of the documents that all unmarked rows share, without those `left_out` (names), or it has a
    `mark`: its own value, of other documents, or, where not `known`, of documents that its Record does not give values
    for.
    """

    left_out: tuple[str, ...] = ()
    mark: str = ""
    known: bool = True


def documents_by_row(record: Record) -> list[Documents | None]:
    """For each row of a Record the documents it sums up; None where the Record does not say, or what it says is not
    what the row holds."""
    hashes: dict[str, dict[str, str]] = {}
    _find_hashes(record.config, hashes)
    takes = _takes(record.examples)
    return [
        _documents(row, takes.get(_part(row), ()), hashes.get(str(row.get("corpus")), {}))
        if row["metric"] == "perplexity"
        else None
        for row in record.rows
    ]


def on_shared_documents(
    rows: Sequence[Row], documents: Sequence[Documents | None], groups: Sequence[Hashable]
) -> list[Row]:
    """The rows, each comparable with those of its group and window or marked.

    documents, groups: one a row; rows whose group is None stay as they are, and so do those of a group whose Records
    all read the same documents.
    """
    found = list(rows)
    columns: dict[Hashable, list[int]] = defaultdict(list)
    for index, (row, group) in enumerate(zip(rows, groups, strict=True)):
        if group is not None:
            columns[group, row["window"]].append(index)
    for column in columns.values():
        own = [documents[index] for index in column]
        for index, row in zip(column, _compared([rows[index] for index in column], own), strict=True):
            found[index] = row
    return found


def mark_of(row: Mapping[str, Any]) -> str:
    """The mark of a row that is not of the shared documents; "" for all others."""
    comparison = row.get(COMPARISON)
    return comparison.mark if comparison else ""


def mark_beside(row: Mapping[str, Any], column: Iterable[Mapping[str, Any]]) -> str:
    """`mark_of`, where something in the column has another one: scales of one Record need none among themselves."""
    return mark_of(row) if len({mark_of(other) for other in column}) > 1 else ""


def comparable(column: Sequence[Row]) -> list[Row]:
    """Rows of a column that are of one text: the unmarked ones; all of them where all have one mark."""
    return [row for row in column if not mark_beside(row, column)]


def apart_words(rows: Iterable[Row], columns: Mapping[int, Sequence[Row]]) -> str:
    """What the name of a line says of its rows, where one stands apart from those of its window's column."""
    marked = [row[COMPARISON] for row in rows if mark_beside(row, columns[row["window"]])]
    if not marked:
        return ""
    return "other documents" if all(one.known for one in marked) else "documents not known"


def comparison_notes(columns: Sequence[Sequence[Row]]) -> tuple[str, ...]:
    """Sentences that a table of these columns (rows of one window each) needs beneath it."""
    windows: dict[tuple[int, str], list[int]] = defaultdict(list)
    left_out: dict[str, None] = {}
    apart: dict[tuple[str, bool], dict[str, None]] = defaultdict(dict)
    for column in columns:
        marked = [row for row in column if mark_beside(row, column)]
        for row in marked:
            of = f" ({format_count(row['documents'])} documents)" if row.get("documents") else ""
            apart[mark_of(row), row[COMPARISON].known][_name(row) + of] = None
        shared = [row for row in column if COMPARISON in row and not mark_of(row)]
        left_out |= dict.fromkeys(name for row in shared for name in row[COMPARISON].left_out)
        if shared:
            who = "all unmarked checkpoints" if marked else "all checkpoints"
            windows[shared[0]["documents"], who].append(shared[0]["window"])
    notes = []
    for (count, who), where in windows.items():
        at = f"at {', '.join(map(format_window, where))}: " if len(where) < len(columns) else ""
        what = "the one document" if count == 1 else f"the {format_count(count)} documents"
        notes.append(sentence_case(f"{at}on {what} that {who} were measured on."))
    if left_out:
        notes[-1] += f" Left out: {_listed(list(left_out))}."
    for (mark, known), names in apart.items():
        notes.append(f"{mark} {', '.join(names)}: {_OTHERS if known else _UNKNOWN}; {_NOT_COMPARABLE}.")
    return tuple(notes)


def _find_hashes(config: Any, found: dict[str, dict[str, str]]) -> None:
    """Corpus -> name -> SHA-256, from wherever a config (of one evaluation, or of several) holds its `corpora`."""
    for name, value in config.items() if isinstance(config, dict) else ():
        if name == "corpora" and isinstance(value, dict):
            for corpus, about in value.items():
                listed = about.get("documents", ()) if isinstance(about, dict) else ()
                entries = [d for d in listed if isinstance(d, dict) and {"name", "sha256"} <= d.keys()]
                found.setdefault(corpus, {}).update({d["name"]: d["sha256"] for d in entries})
        else:
            _find_hashes(value, found)


def _part(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in _PART)


def _takes(examples: Iterable[Mapping[str, Any]]) -> dict[tuple[Any, ...], list[dict[str, Mapping[str, Any]]]]:
    """Part -> its passes over the documents, one after the other: a Record of several checkpoints or methods holds one
    of each, and an example does not say whose it is."""
    takes: dict[tuple[Any, ...], list[dict[str, Mapping[str, Any]]]] = defaultdict(list)
    for example in examples:
        # A document without target tokens adds nothing, and nothing can be said of it alone.
        if example.get("metric") == "perplexity" and example.get("tokens") and {"document", "nats"} <= example.keys():
            passes, name = takes[_part(example)], str(example["document"])
            if not passes or name in passes[-1]:
                passes.append({})
            passes[-1][name] = example
    return takes


def _documents(
    row: Row, takes: Iterable[dict[str, Mapping[str, Any]]], hashes: Mapping[str, str]
) -> Documents | None:
    """Those of the pass whose sums give the row's count and value."""
    for take in takes:
        nats, tokens = (sum(example[name] for example in take.values()) for name in ("nats", "tokens"))
        if tokens != row["n"] or not take.keys() <= hashes.keys():
            continue
        if math.isclose(nats / tokens, math.log(row["value"]), rel_tol=1e-9, abs_tol=1e-9):
            seen: Counter[tuple[str, int]] = Counter()
            found: Documents = {}
            for name, example in take.items():
                same = hashes[name], example["tokens"]
                found[*same, seen[same]] = name, example["nats"]
                seen[same] += 1
            return found
    return None


def _compared(column: Sequence[Row], documents: Sequence[Documents | None]) -> list[Row]:
    """Rows of one group and window."""
    # What cannot be told apart by its documents is at least told apart by what was counted.
    kinds: list[Hashable] = [
        (row["n"], row.get("documents")) if own is None else frozenset(own)
        for row, own in zip(column, documents, strict=True)
    ]
    together, shared = _reference(column, kinds)
    marks = {kind: _mark(index) for index, kind in enumerate(k for k in dict.fromkeys(kinds) if k not in together)}
    found = []
    for row, own, kind in zip(column, documents, kinds, strict=True):
        if kind in marks:
            row = row | {COMPARISON: Comparison(mark=marks[kind], known=own is not None)}
        elif own is not None and len(together) > 1:
            row = _on(row, own, shared)
        found.append(row)
    return found


def _reference(column: Sequence[Row], kinds: Sequence[Hashable]) -> tuple[set[Hashable], frozenset[Key]]:
    """The kinds that stand unmarked, and the documents that all of those share: the kind of most Records, then every
    other one that leaves something in common."""
    sources = {kind: {r.get("source") for r, k in zip(column, kinds, strict=True) if k == kind} for kind in kinds}
    counts = {k: len(k) if isinstance(k, frozenset) else 0 for k in kinds}
    tokens = {kind: row["n"] for row, kind in zip(column, kinds, strict=True)}
    order = sorted(dict.fromkeys(kinds), key=lambda k: (not counts[k], -len(sources[k]), -tokens[k]))
    if not counts[order[0]]:  # no Record says what it read: those that counted the same stand together
        return {order[0]}, frozenset()
    together: set[Hashable] = set()
    shared: frozenset[Key] = frozenset()
    for kind in order:
        if isinstance(kind, frozenset) and (not together or shared & kind):
            shared = shared & kind if together else kind
            together.add(kind)
    return together, shared


def _on(row: Row, own: Documents, shared: frozenset[Key]) -> Row:
    """The row on the shared documents; its value stays to the last bit where those are all that it has."""
    kept = [(nats, tokens) for (sha, tokens, copy), (_, nats) in own.items() if (sha, tokens, copy) in shared]
    nats, tokens = [nats for nats, _ in kept], [tokens for _, tokens in kept]
    whole = len(kept) == len(own)
    value = row["value"] if whole else math.exp(sum(nats) / sum(tokens))
    left_out = tuple(name for key, (name, _) in own.items() if key not in shared)
    base = {name: entry for name, entry in row.items() if name not in INTERVAL_FIELDS}
    # One document has no interval over documents; the row's own one is within it, and holds where the row is whole.
    base |= interval_fields(interval_of_perplexity(nats, tokens)) or (_interval(row) if whole else {})
    counted = {"value": value, "n": sum(tokens), "documents": len(kept)}
    return base | counted | {COMPARISON: Comparison(left_out=left_out)}


def _interval(row: Row) -> dict[str, Any]:
    return {name: row[name] for name in INTERVAL_FIELDS if name in row}


def _mark(index: int) -> str:
    return _MARKS[index % len(_MARKS)] * (1 + index // len(_MARKS))


def _name(row: Row) -> str:
    return " · ".join(str(row[name]) for name in ("checkpoint", "method") if row.get(name))


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {format_count(more)} more" if more > 0 else "")
