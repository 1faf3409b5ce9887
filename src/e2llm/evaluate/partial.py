"""Finished parts of a long measurement, kept in a JSONL file so that a rerun computes only what is missing; and, of a
part that is being measured, the prompts and documents that are done.

Of several processes each writes a file of its own and reads those of all, so that a rerun may have another number of
them.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

Item = TypeVar("Item")
Found = TypeVar("Found")


class Finished:
    """Finished parts in a JSONL file, one a line; without a file nothing is kept. `index`: of the writing process."""

    def __init__(self, path: Path | None, index: int = 0) -> None:
        self.path = path if path is None or index == 0 else path.with_name(f"{path.name}.{index}")
        self._found: dict[str, dict[str, Any]] = {}
        for file in [] if path is None else files(path):
            # Not splitlines(): answers hold separators that it would take for line ends, such as U+2028.
            for line in file.read_text(encoding="utf-8").split("\n"):
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:
                    continue  # the line that was being written when the run was stopped: its part is measured again
                self._found[entry["key"]] = entry["result"]

    def get(self, key: str) -> dict[str, Any] | None:
        return self._found.get(key)

    def add(self, key: str, part: dict[str, Any], result: dict[str, Any]) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"key": key, "part": part, "result": result}, ensure_ascii=False)
        with self.path.open("a", encoding="utf-8") as file:
            # a line break first: the file may end in a half-written line
            file.write("\n" + line)
            file.flush()
            os.fsync(file.fileno())


class Kept:
    """Single results of one part (a prompt's answer, a document's loss), each kept as soon as it is there: a part of
    long windows may take hours. They stand under the part's key, so they are found where all else is the same."""

    def __init__(self, done: Finished, key: str, part: dict[str, Any]) -> None:
        self._done, self._key, self._part = done, key, part

    def get(self, name: int | str) -> dict[str, Any] | None:
        return self._done.get(f"{self._key} {name}")

    def add(self, name: int | str, result: dict[str, Any]) -> None:
        self._done.add(f"{self._key} {name}", {**self._part, "of": name}, result)

    def each(
        self,
        items: Iterable[Item],
        work: Callable[[Item], Found],
        *,
        name: Callable[[Item], int | str],
        dump: Callable[[Found], dict[str, Any]],
        load: Callable[[dict[str, Any]], Found],
    ) -> list[Found]:
        """`work` on each item that is not kept yet; the results of all. `dump` and `load`: a result as JSON, and
        back."""
        found = []
        for item in items:
            known = self.get(name(item))
            if known is None:
                found.append(work(item))
                self.add(name(item), dump(found[-1]))
            else:
                found.append(load(known))
        return found


def files(path: Path) -> list[Path]:
    """`path` and the other processes' files beside it, those that exist."""
    others = [file for file in path.parent.glob(f"{glob.escape(path.name)}.*") if file.suffix[1:].isdigit()]
    return [file for file in (path, *sorted(others)) if file.is_file()]


def remove(path: Path) -> None:
    """Delete them: the Record is written."""
    for file in files(path):
        file.unlink(missing_ok=True)
