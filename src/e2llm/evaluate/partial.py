"""Finished parts of a long measurement, kept in a JSONL file so that a rerun computes only what is missing.

Of several processes each writes a file of its own and reads those of all, so that a rerun may have another number of
them.
"""

from __future__ import annotations

import glob
import json
import os
from pathlib import Path
from typing import Any


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


def files(path: Path) -> list[Path]:
    """`path` and the other processes' files beside it, those that exist."""
    others = [file for file in path.parent.glob(f"{glob.escape(path.name)}.*") if file.suffix[1:].isdigit()]
    return [file for file in (path, *sorted(others)) if file.is_file()]


def remove(path: Path) -> None:
    """Delete them: the Record is written."""
    for file in files(path):
        file.unlink(missing_ok=True)
