"""benchmarks/short_tasks.py: questions whose answer really follows, and which the harness reads and we measure."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from scripts_of import load_script

import e2llm
from e2llm.cli import main
from e2llm.records import Record

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "short_tasks.py"
TINY = Path(e2llm.__file__).parent / "assets" / "tiny-512"


@pytest.fixture(scope="module")
def script() -> Any:
    return load_script(SCRIPT)


def document(name: str) -> str:
    """400 sentences, each of nine to eleven words and all different."""
    return " ".join(
        f"Sentence {i} of {name} says that{' very' * (i % 3)} much is so{'.' if i % 2 else '!'}" for i in range(400)
    )


def test_the_right_answer_follows_the_context_and_the_wrong_ones_do_not(script: Any) -> None:
    text = document("a")
    questions = script.questions_of("a", text, 30)
    assert len(questions) == 30 == len({q["context"] for q in questions})
    for question in questions:
        follows = [f"{question['context']} {choice}" in text for choice in question["choices"]]
        assert follows.count(True) == 1 and follows.index(True) == question["label"]
        assert 100 <= len(question["context"].split()) <= 300 and len(set(question["choices"])) == 4
        lengths = [len(choice.split()) for choice in question["choices"]]
        assert max(lengths) - min(lengths) <= 4
    assert {q["label"] for q in questions} == {0, 1, 2, 3}
    assert script.questions_of("a", text, 30) == questions
    assert script.questions_of("a", "Too short. Nothing to ask.", 30) == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_harness_reads_what_is_written(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    for corpus in script.CORPORA:
        (tmp_path / "text" / corpus).mkdir(parents=True)
        (tmp_path / "text" / corpus / "a.txt").write_text(document(corpus))
    folder, out = tmp_path / "short", tmp_path / "short.json"
    monkeypatch.setattr(sys, "argv", ["x", "--text", str(tmp_path / "text"), "--out", str(folder), "--questions", "5"])
    script.main()
    assert capsys.readouterr().out.count("5 questions of 1 documents") == 2
    assert len(json.loads((folder / "next_sentence_novels.json").read_text())) == 5
    options = ["--suite", "short", "--tasks-folder", str(folder), "--scales", "1", "--device", "cpu", "--out", str(out)]
    assert main(["evaluate", str(TINY), *options]) == 0
    rows = [row for row in Record.load(out).rows if row["harness_metric"] == "acc"]
    assert {row["task"] for row in rows} == {"next_sentence_mathematics", "next_sentence_novels"}
    assert all(row["metric"] == "accuracy" and row["n"] == 5 and row["scale"] == 1.0 for row in rows)
