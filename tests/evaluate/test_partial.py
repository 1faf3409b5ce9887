"""Finished parts: what was written whole is found again, whatever is in it; what was cut off is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from e2llm.evaluate.partial import Finished

SEPARATORS = "\u2028 \u2029 \x85 \x0b \x0c \x1c \x1e \r \n"
"""All that str.splitlines takes for the end of a line."""


def test_answers_with_any_separator_are_found_again(tmp_path: Path) -> None:
    path = tmp_path / "record.json.partial.jsonl"
    result: dict[str, Any] = {"answer": f"a{SEPARATORS}z"}
    Finished(path).add("key", {"task": "vt"}, result)
    Finished(path).add("other", {}, {"answer": "b"})
    found = Finished(path)
    assert found.get("key") == result and found.get("other") == {"answer": "b"}


def test_a_line_that_was_cut_off_costs_its_own_part_alone(tmp_path: Path) -> None:
    path = tmp_path / "record.json.partial.jsonl"
    for key in ("one", "two"):
        Finished(path).add(key, {}, {"answer": key})
    path.write_bytes(path.read_bytes()[:-5])
    Finished(path).add("three", {}, {"answer": "three"})
    found = Finished(path)
    assert [found.get(key) for key in ("one", "two", "three")] == [{"answer": "one"}, None, {"answer": "three"}]
