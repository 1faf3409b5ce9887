"""L-Eval's closed tasks (An et al. 2023, arXiv 2307.11088): coursera, quality, topic retrieval, gsm100.

Flows in: one row of a task's file (a document with several questions). Flows out: samples, and scores of answers.
Wording, length (512 new tokens), cut (the document's end) and scores are those of the benchmark's own scripts, slips of
the pen and oddities included: an answer without a letter counts as "A", and a part of the right letters, an empty
answer too, as a quarter. Such answers are marked as guessed and counted in the Record.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from e2llm.evaluate.samples import Sample, Score, text_field, text_list

MAX_NEW_TOKENS = 512


@dataclass(frozen=True)
class Task:
    """One task: what the model is told, and how document and question follow."""

    name: str
    system: str
    before: str
    after: str
    """{question} is a row's question."""
    answer_start: str
    language: str = "en"
    metric: str = "accuracy"


_LONG = "Now you are given a very long document. Please follow the instruction based on this document. "
_ASKED = " \nQuestion: {question}.  Please directly give answer without any additonal output or explanation "
_EXAM = {"before": "Document is as follows. ", "after": _ASKED, "answer_start": "\nAnswer:"}
_BELOW = {"before": "", "after": "\n\n{question}", "answer_start": ""}

TASKS = {
    task.name: task
    for task in (
        Task(
            "coursera",
            system=_LONG + "For multi-choice questions, there could be a sinlge correct option or multiple correct "
            "options. Please only provide the letter corresponding to the answer (like A or AB) when answering. ",
            **_EXAM,
        ),
        Task(
            "quality",
            system=_LONG + "For multi-choice questions, there is only a sinlge correct option. Please only provide the "
            "letter corresponding to the answer (like A or B) when answering. For other questions, please directly "
            "give the concise and accurate answer. ",
            **_EXAM,
        ),
        Task(
            "topic_retrieval_longchat",
            system="Below is a record of our previous conversation on many different topics. You are the ASSISTANT, "
            "and I am the USER. At the beginning of each topic, the USER will say 'I would like to discuss the topic "
            "of <TOPIC>'. Memorize each <TOPIC>. At the end of the record, I will ask you to retrieve the "
            "first/second/third topic names. Now the record start. ",
            **_BELOW,
        ),
        Task(
            "gsm100",
            system="Given several question answer pairs, you need to follow a similar format to answer the last "
            "question. Make sure the response is end with The answer is _ . ",
            **_BELOW,
        ),
    )
}
"""Task -> how it is asked (Baselines/LEval_config.py and llama2-chat-test.py of L-Eval)."""


def make_samples(name: str, row: Mapping[str, Any], identity: str) -> list[Sample]:
    """One sample a question of a row: input, instructions, outputs. ValueError where they do not fit together."""
    task = TASKS[name]
    document = text_field(row, "input")
    questions, answers = text_list(row, "instructions"), text_list(row, "outputs")
    if len(questions) != len(answers):
        raise ValueError(f"{len(questions)} instructions and {len(answers)} outputs: one answer a question is expected")
    return [
        Sample(
            task=name,
            identity=f"{identity}, question {number}",
            system=task.system,
            before=task.before,
            body=document,
            cut="end",
            after=task.after.replace("{question}", question),
            answer_start=task.answer_start,
            answers=(answer,),
            max_new_tokens=MAX_NEW_TOKENS,
        )
        for number, (question, answer) in enumerate(zip(questions, answers, strict=True), start=1)
    ]


def score(sample: Sample, prediction: str) -> Score:
    """Exact match as L-Eval scores it (Evaluation/auto_eval.py and em.py)."""
    answer = sample.answers[0]
    if sample.task in ("coursera", "quality"):
        letters = _letters_of_answer(prediction, several=sample.task == "coursera")
        guessed = not letters
        if guessed and prediction:
            letters = "A"
        return Score(_exact_match(letters, _letters_of_reference(answer)), guessed=guessed)
    if sample.task == "gsm100":
        number = _number(prediction)
        return Score(_exact_match(number, _number(answer)))
    return Score(_exact_match(prediction, answer))


def prepare(tasks: list[str]) -> None:
    """Nothing beyond the standard library is needed."""


def _letters_of_reference(answer: str) -> str:
    """Letters A to D of its first word; "A" where there is none."""
    return re.sub("[^A-D]", "", answer.split()[0]) or "A"


def _letters_of_answer(prediction: str, *, several: bool) -> str:
    """Letters that an answer chooses; "" where it chooses none. One question takes the first letter A to D anywhere."""
    if prediction in "ABCD":
        return prediction
    if not several:
        found = re.search("[A-D]", prediction)
        if found:
            return found[0]
    opening = re.match("[A-D]*", prediction)
    assert opening is not None
    if len(opening[0]) > 1:
        return "".join(sorted(set(opening[0])))
    rest = prediction[len(opening[0]) :].split("Question")[0]
    options = opening[0] + "".join(re.findall(r"\s*[A-Z](?=[\s.)])", rest))
    return "".join(sorted(set(options) & set("ABCD")))


def _number(text: str) -> str:
    """Digits, up to a point, of what follows "The answer is", else of the last word with a digit in the first
    paragraph."""
    stated = re.search(r"The answer is (\S+)", text)
    if stated:
        word = stated[1]
    else:
        words = text.split("\n\n")[0].split(" ")
        word = next((word for word in reversed(words) if any(c.isdigit() for c in word)), "")
    return "".join(c for c in word.split(".")[0] if c.isdigit())


def _exact_match(prediction: str, reference: str) -> float:
    """1, 0, or 0.25 where only letters of the right ones were chosen, and not all; none of them counts too."""
    wanted = _normalized(reference)
    if set(wanted) <= set("ABCD"):
        chosen = _normalized(prediction)
        return 1.0 if chosen == wanted else 0.25 if set(chosen) <= set(wanted) else 0.0
    try:
        return float(float(prediction) == float(reference))
    except ValueError:
        line = next((line for line in prediction.split("\n") if len(line) > 1), prediction)
        return float(reference.lower().replace(" ", "") in line.lower().replace(" ", ""))


def _normalized(text: str) -> str:
    bare = text.translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())
