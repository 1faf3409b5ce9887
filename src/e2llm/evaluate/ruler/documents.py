"""RULER's questions over documents: the ones that hold the answer among many that do not.

Flows in: a file of questions (SQuAD's JSON, HotpotQA's JSON, or JSONL with question, answers, documents and maybe
distractors). Flows out: questions of any length: other questions' documents and all distractors fill the window, the
last of them cut (RULER, arXiv
2404.06654, Sect. 3: SQuAD for qa_1, HotpotQA for qa_2).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from e2llm.evaluate.questions import Draft, Texts

_ASKED = "Answer the question based on the given documents. Only give me the answer and do not output any other words."
BODY = _ASKED + "\n\nThe following are given documents.\n\n{context}\n\n" + _ASKED + "\n\nQuestion: {question}"
ANSWER = " Answer:"


@dataclass(frozen=True)
class Asked:
    """A question, its answers (spellings of one) and the documents that belong to it."""

    question: str
    answers: tuple[str, ...]
    documents: tuple[str, ...]
    distractors: tuple[str, ...] = ()
    """Documents that hold no answer; they fill other questions' windows too."""


def read_questions(path: str | Path) -> list[Asked]:
    """Questions of a file. Raises ValueError naming file and entry for what is malformed or missing."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"qa = {str(path)!r}: no such file of questions")
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix == ".jsonl":
            # Not splitlines(): documents hold separators that it would take for line ends, such as U+2028.
            lines = [(i, line) for i, line in enumerate(text.split("\n"), start=1) if line.strip()]
            found = [_plain(json.loads(line), f"{path}: line {i}") for i, line in lines]
        else:
            document = json.loads(text)
            found = list(_squad(document) if isinstance(document, dict) else _hotpot(document))
    except (json.JSONDecodeError, KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"{path}: no questions of a known form ({error!r}): use SQuAD's or HotpotQA's JSON, or JSONL with "
            "question, answers and documents"
        ) from error
    if not found:
        raise ValueError(f"{path}: holds no question with an answer")
    return found


def _plain(row: Any, where: str) -> Asked:
    try:
        lists = (tuple(row["answers"]), tuple(row["documents"]), tuple(row.get("distractors", ())))
        asked = Asked(row["question"], *lists)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{where}: needs question, answers and documents; {error!r}") from error
    if (
        not asked.answers
        or not asked.documents
        or not all(isinstance(t, str) for t in (*asked.answers, *asked.documents, *asked.distractors))
    ):
        raise ValueError(f"{where}: answers and documents are lists of text with at least one each, as are distractors")
    return asked


def _squad(document: Any) -> Iterator[Asked]:
    for article in document["data"]:
        for paragraph in article["paragraphs"]:
            for asked in paragraph["qas"]:
                answers = tuple(dict.fromkeys(answer["text"] for answer in asked["answers"]))
                if answers and not asked.get("is_impossible", False):
                    yield Asked(asked["question"], answers, (paragraph["context"],))


def _hotpot(document: Any) -> Iterator[Asked]:
    for row in document:
        supporting = {title for title, _ in row["supporting_facts"]} if "supporting_facts" in row else None
        documents = [(title, f"{title}\n{''.join(sentences)}") for title, sentences in row["context"]]
        gold = tuple(text for title, text in documents if supporting is None or title in supporting)
        others = tuple(text for _, text in documents if text not in gold)
        yield Asked(row["question"], (row["answer"],), gold, others)


def over_documents(asked: list[Asked]) -> Callable[[Texts, np.random.Generator, int, int], Draft]:
    """A maker of questions over `asked`: the index-th question (in a drawn order) among other questions' documents."""
    order = np.random.default_rng(0).permutation(len(asked))
    pool = list(dict.fromkeys(text for one in asked for text in (*one.documents, *one.distractors)))

    def make(texts: Texts, random: np.random.Generator, window: int, index: int) -> Draft:
        one = asked[int(order[index % len(asked)])]
        others = [pool[int(i)].split() for i in random.permutation(len(pool)) if pool[int(i)] not in one.documents]
        places = random.random(len(one.documents))
        sizes = np.cumsum([len(words) for words in others]) if others else np.zeros(0, dtype=int)

        def body(size: int) -> str:
            whole = int(np.searchsorted(sizes, size, side="right"))
            used = [" ".join(words) for words in others[:whole]]
            rest = size - (int(sizes[whole - 1]) if whole else 0)
            if rest and whole < len(others):
                used.append(" ".join(others[whole][:rest]))
            for text, place in zip(one.documents, places, strict=True):
                used.insert(round(float(place) * len(used)), text)
            return BODY.format(
                context="\n\n".join(f"Document {i}:\n{text}" for i, text in enumerate(used, start=1)),
                question=one.question,
            )

        most = int(sizes[-1]) if len(sizes) else 0
        return Draft(body=body, answer_start=ANSWER, expected=one.answers, most=most)

    return make
