"""L-Eval's closed tasks: scores worked by hand from the benchmark's published rules."""

from __future__ import annotations

from typing import Any

import pytest

from e2llm.evaluate.leval import TASKS, make_samples, score
from e2llm.evaluate.samples import Sample


def row(**fields: Any) -> dict[str, Any]:
    return {"input": "A long {document}.", "instructions": ["What?", "Why?"], "outputs": ["B", "AC"]} | fields


def sample(task: str, answer: str) -> Sample:
    (found,) = make_samples(task, row(instructions=["What?"], outputs=[answer]), "1")
    return found


@pytest.mark.parametrize(
    ("task", "answer", "prediction", "value", "guessed"),
    [
        ("coursera", "BD", "BD", 1.0, False),
        ("coursera", "BD", "DB", 1.0, False),
        ("coursera", "BD", "B", 0.25, False),  # a part of the right ones
        ("coursera", "BD", "BC", 0.0, False),
        ("coursera", "BD", "B. D. are right", 1.0, False),
        ("coursera", "BD", "B) and D)", 1.0, False),
        ("coursera", "B", "BB", 1.0, False),
        ("coursera", "A", "none of them", 1.0, True),  # no letter counts as A
        ("coursera", "B", "none of them", 0.0, True),
        ("coursera", "B", "", 0.25, True),  # nothing is a part of everything
        ("coursera", "B", "B Question: 2 A. C.", 1.0, False),
        ("coursera", "B", "The answer is B.", 1.0, False),
        ("coursera", "C", "Ｃ", 0.0, True),  # full width
        ("quality", "(B) Their subconscious", "B", 1.0, False),
        ("quality", "(B) Their subconscious", "(B) Their", 1.0, False),
        ("quality", "(B) Their subconscious", "b", 0.0, True),
        ("quality", "(B) Their subconscious", "Being Careless: B", 1.0, False),  # first of A to D anywhere
        ("quality", "(B) Their subconscious", "Can be B", 0.0, False),
        ("tpo", "C", "(C) because", 1.0, False),
        ("tpo", "C", "None", 0.0, True),
        ("codeU", "[1, 2]", "The result of the code is [1,2]", 1.0, False),
        ("codeU", "[1, 2]", "The value of the final output will be [ 1, 2.0 ] and more words follow it", 1.0, False),
        ("codeU", "[[3] [4]]", "printed [[3][4]]", 1.0, False),
        ("codeU", "7", "7 is far from the last words of this long answer", 0.0, False),
        ("codeU", "7", "the final output 7 is far from the last words of this long answer", 1.0, False),
        ("gsm100", "18", "The answer is 18.", 1.0, False),
        ("gsm100", "18", "She has $18.00 left", 1.0, False),
        ("gsm100", "18", "9 + 9 = 18\n\nQuestion: 5", 1.0, False),
        ("gsm100", "18", "The answer is 180", 0.0, False),
        ("gsm100", "1,800", "The answer is 1800", 1.0, False),
        ("gsm100", "18", "eighteen", 0.0, False),
        ("gsm100", "18", "", 0.0, False),
        ("topic_retrieval_longchat", "The role of art", "\nthe role of ART in society\nOther", 1.0, False),
        ("topic_retrieval_longchat", "The role of art", "Other\nThe role of art", 0.0, False),
        ("topic_retrieval_longchat", "The role of art", "", 0.0, False),
    ],
)
def test_scores(task: str, answer: str, prediction: str, value: float, guessed: bool) -> None:
    found = score(sample(task, answer), prediction)
    assert (found.value, found.guessed) == (value, guessed)


def test_a_question_of_science_fiction_is_asked_of_the_document_and_of_the_world() -> None:
    question = "Water burns, based on the world described in the document."
    fields = row(instructions=[question], outputs=["True [fact: False]"])
    of_document, of_world = make_samples("sci_fi", fields, "3")
    assert of_document.body == "A long {document}." and question in of_document.after and of_document.chat
    assert (of_world.system, of_world.before, of_world.after, of_world.chat) == ("", "", "", False)
    assert of_world.body == "Water burns, based on the real-world knowledge and facts up until your last training"
    assert (of_document.answers, of_world.answers) == (("true",), ("false",))
    assert of_document.identity != of_world.identity
    for written, values in (("It is TRUE.", (1.0, 0.0)), ("falsehood", (0.0, 1.0)), ("maybe", (0.0, 0.0))):
        assert tuple(score(one, written).value for one in (of_document, of_world)) == values
    with pytest.raises(ValueError, match=r"question 1: outputs = 'True': an answer and \[fact: an answer\]"):
        make_samples("sci_fi", row(instructions=[question], outputs=["True"]), "3")


def test_code_loses_its_beginning() -> None:
    (found,) = make_samples("codeU", row(instructions=["What?"], outputs=["1"]), "1")
    assert found.cut == "beginning" and found.after == "\n\nWhat?"


def test_one_sample_a_question() -> None:
    first, second = make_samples("quality", row(outputs=["(B) x", "(A) y"]), "7")
    assert (first.identity, second.identity) == ("7, question 1", "7, question 2")
    assert first.before == "Document is as follows. " and first.body == "A long {document}." and first.cut == "end"
    assert "\nQuestion: Why?.  Please" in second.after and second.answer_start == "\nAnswer:"
    assert len(TASKS) == 7 and len({task.system for task in TASKS.values()}) == 6  # quality and tpo are told the same


def test_questions_without_answers_are_refused() -> None:
    with pytest.raises(ValueError, match="2 instructions and 1 outputs"):
        make_samples("gsm100", row(outputs=["3"]), "1")
