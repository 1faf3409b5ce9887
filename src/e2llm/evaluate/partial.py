"""Finished parts of a long measurement, kept in a JSONL file so that a rerun computes only what is missing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class Finished:
    """Finished parts in a JSONL file, one a line; without a file nothing is kept."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._found: dict[str, dict[str, Any]] = {}
        if path is not None and path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
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
