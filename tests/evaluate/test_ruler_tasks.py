"""Every kind: as long as its window allows, the same for everybody, and with the answer that a reader would find."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from ruler_texts import word_texts

from e2llm.evaluate.config import RULER
from e2llm.evaluate.fit import make_frame
from e2llm.evaluate.questions import Question, Texts, make_question
from e2llm.evaluate.ruler.lists import frequent_words
from e2llm.evaluate.ruler.tasks import ruler_kinds

KINDS = ruler_kinds({})
WINDOWS = (1024, 8192)
SLACK = {"cwe": 30, "niah_single_1": 12, "vt": 12, "fwe": 30}
"""Tokens below the window at most: a word of the list three times, a sentence of noise; 12 for all others."""


@pytest.fixture(scope="module")
def texts() -> Texts:
    return word_texts()


def ask(texts: Texts, name: str, window: int, index: int = 0, seed: int = 0) -> tuple[Question, str]:
    frame = make_frame(texts.tokenizer, False)
    question = make_question(KINDS[name], texts, frame, window=window, index=index, seed=seed)
    return question, texts.tokenizer.decode(question.token_ids)


def test_thirteen_kinds_of_which_two_need_a_file(tmp_path: Path) -> None:
    assert {*KINDS, "qa_1", "qa_2"} == set(RULER) and len(RULER) == 13


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", KINDS)
def test_the_length_is_exact(texts: Texts, name: str, window: int) -> None:
    for index in range(3):
        question, _ = ask(texts, name, window, index)
        used = len(question.token_ids) + question.answer_tokens
        assert window - SLACK.get(name, 12) <= used <= window


@pytest.mark.parametrize("name", KINDS)
def test_a_question_depends_on_seed_window_and_index_alone(texts: Texts, name: str) -> None:
    again = Texts(texts.documents, texts.tokenizer)
    assert ask(texts, name, 1024, 1)[0] == ask(again, name, 1024, 1)[0]
    others = [ask(texts, name, 1024, 2)[0], ask(texts, name, 1024, 1, seed=1)[0]]
    assert all(other.expected != ask(texts, name, 1024, 1)[0].expected for other in others)


@pytest.mark.parametrize("name", [name for name in KINDS if name.startswith("niah")])
def test_needles_answer_what_is_asked(texts: Texts, name: str) -> None:
    question, text = ask(texts, name, 4096, 4)
    body, _, asked = text.rpartition("\nWhat ")
    facts = re.findall(r"One of the special magic (?:numbers|uuids) for (\S+) is: (\S+)\.", body)
    names = re.findall(r"[\w-]*\w-\w[\w-]*", asked.split(" mentioned")[0])
    assert sorted(value for key, value in facts if key in names) == sorted(question.expected)
    counts = {"niah_multivalue": 4, "niah_multiquery": 4}
    assert len(question.expected) == counts.get(name, 1) == len(question.depths)
    hidden = {"niah_multikey_1": 4, "niah_multivalue": 4, "niah_multiquery": 4}
    if name.startswith(("niah_multikey_2", "niah_multikey_3")):
        assert len(facts) > 20
    else:
        assert len(facts) == hidden.get(name, 1)
    for value, depth in zip(question.expected, question.depths, strict=True):
        place = body.index(value) / len(body)
        assert abs(place - depth) < 0.12  # moved on to the end of a sentence


def test_a_chain_of_variables_leads_to_all_names_and_no_other(texts: Texts) -> None:
    for index in range(5):
        question, text = ask(texts, "vt", 4096, index)
        shown, _, asked = text.rpartition("Memorize and track")
        value = re.search(r"assigned the value (\d{5}) in the text above", asked)
        assert value is not None
        held: dict[str, str] = {}
        for name, source in re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)\.", asked):
            held[name] = held.get(source, source)
        assert sorted(name for name in held if held[name] == value[1]) == sorted(question.expected)
        assert len(question.expected) == 5
        example = re.search(r"they are: ([A-Z ]+)", shown)  # the example shown is solved, and of other names
        assert example is not None and not set(example[1].split()) & set(question.expected)


@pytest.mark.parametrize("window", WINDOWS)
def test_common_words_are_the_ten_that_stand_most_often(texts: Texts, window: int) -> None:
    question, text = ask(texts, "cwe", window)
    listed = text.rpartition("appear most often.\n")[2].split("\nQuestion")[0]
    counts = Counter(re.findall(r"\d+\. (\w+)", listed))
    top = counts.most_common(10)
    assert {word for word, _ in top} == set(question.expected)
    often, seldom = (6, 1) if window < 8192 else (30, 3)
    assert {n for _, n in top} == {often} and set(counts.values()) == {often, seldom}


@pytest.mark.parametrize("window", WINDOWS)
def test_frequent_words_are_the_three_after_the_dots(texts: Texts, window: int) -> None:
    for index in range(3):
        question, text = ask(texts, "fwe", window, index)
        words = text.split("coded words. ")[1].split("\nQuestion")[0].split()
        counts = Counter(words).most_common(5)
        assert counts[0][0] == "...." and tuple(word for word, _ in counts[1:4]) == question.expected
        assert counts[3][1] > counts[4][1]


def test_frequent_words_are_no_tie_in_the_shortest_text(texts: Texts) -> None:
    draft = frequent_words(texts, np.random.default_rng(0), 1024, 0)
    words = draft.body(draft.least).split("coded words. ")[1].split("\nQuestion")[0].split()
    counts = [n for _, n in Counter(words).most_common(5)]
    assert counts == sorted(set(counts), reverse=True)


def test_a_window_that_is_too_small_and_a_text_that_is_too_short(texts: Texts) -> None:
    with pytest.raises(ValueError, match="cwe at window 256: needs"):
        ask(texts, "cwe", 256)
    with pytest.raises(ValueError, match=r"niah_single_2 at window 131072: the text given ends after"):
        ask(texts, "niah_single_2", 131072)


def test_poor_text_is_named() -> None:
    from e2llm.evaluate.ruler.words import words_of

    with pytest.raises(ValueError, match="2 different words"):
        words_of(["only these, only these 12 ab"])
