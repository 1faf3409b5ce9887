"""Questions over documents: three forms of file, the gold document always there, bad files named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ruler_texts import word_texts

from e2llm.evaluate.fit import make_frame
from e2llm.evaluate.questions import Texts, make_question
from e2llm.evaluate.ruler.documents import Asked, read_questions
from e2llm.evaluate.ruler.tasks import ruler_kinds

SQUAD = {
    "data": [
        {
            "paragraphs": [
                {
                    "context": "Ada wrote notes.",
                    "qas": [
                        {"question": "Who?", "answers": [{"text": "Ada"}, {"text": "Ada"}, {"text": "Ada L."}]},
                        {"question": "No?", "answers": [], "is_impossible": True},
                    ],
                }
            ]
        }
    ]
}
HOTPOT = [
    {
        "question": "Where?",
        "answer": "Ulm",
        "supporting_facts": [["Albert", 0]],
        "context": [["Albert", ["Born ", "in Ulm."]], ["Other", ["Nothing."]]],
    }
]


@pytest.fixture(scope="module")
def texts() -> Texts:
    return word_texts()


def write(folder: Path, name: str, content: object) -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_three_forms(tmp_path: Path) -> None:
    assert read_questions(write(tmp_path, "squad.json", SQUAD)) == [
        Asked("Who?", ("Ada", "Ada L."), ("Ada wrote notes.",))
    ]
    assert read_questions(write(tmp_path, "hotpot.json", HOTPOT)) == [
        Asked("Where?", ("Ulm",), ("Albert\nBorn in Ulm.",), ("Other\nNothing.",))
    ]
    row = {"question": "q", "answers": ["a"], "documents": ["d\u2028e\x85"]}
    text = json.dumps(row, ensure_ascii=False) + "\n"
    assert read_questions(write(tmp_path, "own.jsonl", text)) == [Asked("q", ("a",), ("d\u2028e\x85",))]
    more = read_questions(write(tmp_path, "own.jsonl", json.dumps({**row, "distractors": ["e"]})))
    assert more == [Asked("q", ("a",), ("d\u2028e\x85",), ("e",))]


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("a.jsonl", '{"question": "q", "answers": ["a"]}', "line 1: needs question, answers and documents"),
        ("b.jsonl", '{"question": "q", "answers": [], "documents": ["d"]}', "line 1: answers and documents"),
        ("b.jsonl", '{"question": "q", "answers": ["a"], "documents": ["d"], "distractors": [1]}', "as are dis"),
        ("c.json", '{"rows": []}', "no questions of a known form"),
        ("d.json", "[", "no questions of a known form"),
        ("e.json", '{"data": []}', "holds no question"),
    ],
)
def test_malformed_files_are_named(tmp_path: Path, name: str, content: str, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        read_questions(write(tmp_path, name, content))
    with pytest.raises(ValueError, match="no such file"):
        read_questions(tmp_path / "absent.json")


def test_the_window_is_filled_with_other_questions_documents(tmp_path: Path, texts: Texts) -> None:
    rows = [
        {
            "question": f"Question {i}?",
            "answers": [f"answer{i}"],
            "documents": [f"Document about answer{i}. " + "x y z " * 40],
        }
        for i in range(30)
    ]
    path = write(tmp_path, "own.jsonl", "\n".join(map(json.dumps, rows)))
    kind = ruler_kinds({"qa_1": str(path)})["qa_1"]
    frame = make_frame(texts.tokenizer, False)
    places = set()
    for index in range(6):
        question = make_question(kind, texts, frame, window=2048, index=index, seed=0)
        text = texts.tokenizer.decode(question.token_ids)
        number = question.expected[0].removeprefix("answer")
        assert text.rstrip().endswith(f"Question: Question {number}? Answer:")
        assert text.count(f"Document about {question.expected[0]}.") == 1
        assert 2048 - 12 <= len(question.token_ids) + question.answer_tokens <= 2048
        places.add(text.index(question.expected[0]) * 4 // len(text))
    assert len(places) > 1
    with pytest.raises(ValueError, match=r"qa_1 at window 65536: the text given ends"):
        make_question(kind, texts, frame, window=65536, index=0, seed=0)


def test_distractors_fill_the_window_of_a_lone_question(tmp_path: Path, texts: Texts) -> None:
    row = {
        "question": "Where?",
        "answers": ["Ulm"],
        "documents": ["Born in Ulm."],
        "distractors": [f"Distractor {i}. " + "x y z " * 40 for i in range(30)],
    }
    kind = ruler_kinds({"qa_2": str(write(tmp_path, "own.jsonl", json.dumps(row)))})["qa_2"]
    question = make_question(kind, texts, make_frame(texts.tokenizer, False), window=2048, index=0, seed=0)
    text = texts.tokenizer.decode(question.token_ids)
    assert text.count("Born in Ulm.") == 1 and text.count("Distractor") > 5
    assert 2048 - 12 <= len(question.token_ids) + question.answer_tokens <= 2048
