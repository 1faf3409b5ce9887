"""benchmarks/ruler_qa.py: LongBench's questions become RULER's, with what they were asked over."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from scripts_of import load_script

from e2llm.evaluate.ruler.documents import Asked, read_questions

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "ruler_qa.py"
CONTEXT = "Passage 1:\nAlbert\nBorn in Ulm.\n\nPassage 2:\nOther\nNothing of it.\n\nPassage 3:\nUlm\nA town.\n"


@pytest.fixture(scope="module")
def script() -> Any:
    return load_script(SCRIPT)


def call(script: Any, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["ruler_qa.py", "--longbench", str(folder), "--out", str(folder / "out")])
    script.main()


def test_passages_with_the_answer_are_the_questions_documents(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"input": "Where?", "answers": ["ulm"], "context": CONTEXT}
    for task in ("2wikimqa", "hotpotqa"):
        lines = [json.dumps(row), json.dumps({**row, "answers": ["yes"]})]
        (tmp_path / f"{task}.jsonl").write_text("\n".join(lines) + "\n")
    call(script, monkeypatch, tmp_path)
    for kind in ("qa_1", "qa_2"):
        assert read_questions(tmp_path / "out" / f"{kind}.jsonl") == [
            Asked("Where?", ("ulm",), ("Albert\nBorn in Ulm.", "Ulm\nA town."), ("Other\nNothing of it.",))
        ]
    assert "1 of 2 left out" in capsys.readouterr().out


def test_what_is_missing_is_named(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=r"has no 2wikimqa\.jsonl"):
        call(script, monkeypatch, tmp_path)
    (tmp_path / "2wikimqa.jsonl").write_text('{"input": "Where?"}\n')
    with pytest.raises(SystemExit, match="line 1: needs input, answers and context"):
        call(script, monkeypatch, tmp_path)
