"""benchmarks/code_answers.py: answers are sorted by the code they begin with, in every wording; weights move between
two checkpoints."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scripts_of import load_script
from torch import nn

import e2llm
from e2llm.evaluate.documents import Document
from e2llm.evaluate.retrieval import make_prompts
from e2llm.hf.load import load_tokenizer
from e2llm.records import Record

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "code_answers.py"
TINY = Path(e2llm.__file__).parent / "assets" / "tiny-512"


@pytest.fixture(scope="module")
def script() -> Any:
    return load_script(SCRIPT)


def test_an_answer_is_sorted_by_the_code_it_begins_with(script: Any) -> None:
    facts = [("aaaaaa-name", "bbbbbb-value"), ("cccccc-name", "dddddd-value")]
    for answer, kind in (
        (' "bbbbbb-value"', "right"),
        ("\n[bbbbbb, cut short", "right"),
        (" dddddd-value", "other value"),
        ("aaaaaa-name", "asked name"),
        ("'cccccc-name'", "other name"),
        (" the bbbbbb-value", "none"),
        (" bbbbb", "none"),
        ("", "none"),
    ):
        assert script.kind_of(answer, facts) == kind, answer


def test_the_facts_of_a_prompt_are_those_it_holds(script: Any) -> None:
    tokenizer = load_tokenizer(str(TINY))
    documents = [Document("one", np.asarray(tokenizer("a line of text\n" * 900).input_ids, dtype=np.int32))]
    for task in script.WORDINGS.values():
        for prompt in make_prompts(tokenizer, documents, window=2048, num_prompts=3, seed=1, task=task):
            text = tokenizer.decode(list(prompt.token_ids))
            facts = script.facts_of(prompt, task)
            assert len({code for fact in facts for code in fact}) == 6
            assert all(n[: script.PREFIX] != v[: script.PREFIX] for n, v in facts)
            assert all(task.statement.format(name=n, value=v).strip() in text for n, v in facts), task.name
            assert task.question.format(name=facts[0][0]).strip() in text.rsplit("line of text", 1)[1]


def test_weights_move_between_two_checkpoints(script: Any) -> None:
    model = nn.Linear(2, 2, bias=False)
    start, end = {"weight": torch.zeros(2, 2)}, {"weight": torch.full((2, 2), 4.0)}
    for share, value in ((0.25, 1.0), (1.0, 4.0), (0.0, 0.0)):
        script.move(model, start, end, share)
        assert torch.equal(model.weight.detach(), torch.full((2, 2), value))


def test_a_run_writes_shares_of_every_kind(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = tmp_path / "eval" / "novels"
    corpus.mkdir(parents=True)
    (corpus / "one.txt").write_text("a line of text\n" * 600)
    out = tmp_path / "found.json"
    given = [str(TINY), "--text", str(tmp_path), "--windows", "1k", "--wordings", "uuid_kv", "arrow", "--prompts", "3"]
    more = ["--batch-size", "1", "--base", str(TINY), "--share", "0.5", "1", "--out", str(out), "--scale", "4"]
    monkeypatch.setattr(sys, "argv", ["code_answers.py", *given, *more])
    assert script.main() == 0
    rows = Record.load(out).rows
    assert len(rows) == 2 * 2 * len(script.KINDS) and {row["scale"] for row in rows} == {4.0}, "2 is the window's own"
    for wording in ("uuid_kv", "arrow"):
        for share in (0.5, 1.0):
            found = [row["value"] for row in rows if (row["wording"], row["share"]) == (wording, share)]
            assert sum(found) == pytest.approx(1) and len(found) == len(script.KINDS)
    assert "tiny-512 0.5" in capsys.readouterr().out


def test_a_share_needs_a_base(script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["code_answers.py", "model", "--text", "text", "--share", "0.5"])
    with pytest.raises(SystemExit):
        script.main()
    assert "--base" in capsys.readouterr().err
