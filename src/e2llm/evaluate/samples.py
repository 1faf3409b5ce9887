"""Task data: JSONL files of a folder, a .zip or the hub become rows, and rows become samples to be asked.

A row that cannot be used is kept as a `Skipped` with its reason, never scored as 0; a task without a file is named.
Knows no model and no metric.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class Sample:
    """One question: text before, the long text, text after, and what counts as an answer."""

    task: str
    identity: str
    """Names the sample within its task, the same in every run."""
    body: str
    """What is cut where the prompt does not fit."""
    cut: Literal["middle", "end", "beginning"]
    """middle: the two ends of the body stay; end: its beginning stays; beginning: its end stays."""
    answers: tuple[str, ...]
    max_new_tokens: int
    classes: tuple[str, ...] = ()
    chat: bool = True
    """Whether the prompt is meant for a chat template."""
    system: str = ""
    before: str = ""
    after: str = ""
    answer_start: str = ""
    """What the answer begins with, after the chat template's own opening."""


@dataclass(frozen=True)
class Score:
    """Score of one answer, 0 to 1. `guessed`: nothing in the answer could be read as one and the published rule took a
    fixed guess for it."""

    value: float
    guessed: bool = False


@dataclass(frozen=True)
class Skipped:
    """A row or sample that was left out, and why."""

    task: str
    identity: str
    reason: str


@dataclass(frozen=True)
class Source:
    """Where task files are: lines of `TASK.jsonl`, None where there is none."""

    name: str
    lines: Callable[[str], list[str] | None]


def text_field(row: Mapping[str, Any], name: str, *, empty: bool = False) -> str:
    """A text of the row; ValueError where it is missing, no text, or blank and not allowed to be."""
    value = row.get(name)
    if not isinstance(value, str):
        raise ValueError(f"{name} is {'missing' if name not in row else type(value).__name__}, a text is expected")
    if not empty and not value.strip():
        raise ValueError(f"{name} is empty")
    return value


def text_list(row: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """A list of texts, at least one and none blank; ValueError otherwise."""
    value = row.get(name)
    if not isinstance(value, list) or not value or not all(isinstance(v, str) and v.strip() for v in value):
        raise ValueError(f"{name} = {str(value)[:60]}: a list of texts is expected, at least one, none of them empty")
    return tuple(value)


def read_samples(
    source: Source, task: str, make: Callable[[str, Mapping[str, Any], str], Sequence[Sample]]
) -> tuple[list[Sample], list[Skipped]] | None:
    """Samples of one task and the rows left out; None where the source has no such task."""
    lines = source.lines(task)
    if lines is None:
        return None
    samples: list[Sample] = []
    skipped: list[Skipped] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        identity = f"line {number}"
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"a {type(row).__name__}, an object is expected")
            identity = str(row.get("_id") or identity)
            samples += make(task, row, identity)
        except json.JSONDecodeError as error:
            skipped.append(Skipped(task, identity, f"no JSON: {error.msg} at column {error.colno}"))
        except ValueError as error:
            skipped.append(Skipped(task, identity, str(error)))
    return samples, skipped


def open_source(path: str, hub: Callable[[str], Path], files: Callable[[str], str]) -> Source:
    """Task files under `path`: a folder or a .zip (its own files or those of a folder `data`), or "hub".

    On the hub `hub(task)` fetches the file that holds a task: a .jsonl, or a .zip with `files(task)` in it. ValueError
    for a path that does not exist.
    """
    if path == "hub":
        return Source("hub", lambda task: _lines_of(hub(task), files(task)))
    root = Path(path)
    if not root.is_dir() and not zipfile.is_zipfile(root):
        raise ValueError(f"tasks_folder = {path!r}: no such folder or .zip; give one with TASK.jsonl files, or hub")
    return Source(root.name, lambda task: _lines_of(root, f"{task}.jsonl"))


def _lines_of(root: Path, name: str) -> list[str] | None:
    """Lines of file `name` of a folder or .zip; of `root` itself where it is a plain file."""
    for content in _candidates(root, name):
        try:
            # Not splitlines(): texts hold separators that it would take for line ends, such as U+2028.
            return content.decode("utf-8").split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{root.name}: {name} is no UTF-8 at byte {error.start}; convert it") from error
    return None


def _candidates(root: Path, name: str) -> Iterator[bytes]:
    places = (name, f"data/{name}")
    if root.is_dir():
        yield from (path.read_bytes() for path in (root / place for place in places) if path.is_file())
    elif zipfile.is_zipfile(root):
        with zipfile.ZipFile(root) as archive:
            held = set(archive.namelist())
            yield from (archive.read(place) for place in places if place in held)
    else:
        yield root.read_bytes()
