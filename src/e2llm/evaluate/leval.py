"""L-Eval's closed tasks (An et al. 2023, arXiv 2307.11088): coursera, quality, tpo, topic retrieval, gsm100, codeU and
sci_fi.

Flows in: one row of a task's file (a document with several questions). Flows out: samples, and scores of answers.
Wording, length (512 new tokens), cut (the document's end, code's beginning) and scores are those of the benchmark's own
scripts, slips of the pen and oddities included: an answer without a letter counts as "A", and a part of the right
letters, an empty answer too, as a quarter. Such answers are marked as guessed and counted in the Record. A question of
sci_fi is asked twice, of the document and of the real world, and both answers count.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

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
    cut: Literal["end", "beginning"] = "end"
    language: str = "en"
    metric: str = "accuracy"


_LONG = "Now you are given a very long document. Please follow the instruction based on this document. "
_ASKED = " \nQuestion: {question}.  Please directly give answer without any additonal output or explanation "
_EXAM: dict[str, Any] = {"before": "Document is as follows. ", "after": _ASKED, "answer_start": "\nAnswer:"}
_BELOW: dict[str, Any] = {"before": "", "after": "\n\n{question}", "answer_start": ""}

_ONE_LETTER = (
    _LONG + "For multi-choice questions, there is only a sinlge correct option. Please only provide the letter "
    "corresponding to the answer (like A or B) when answering. For other questions, please directly give the concise "
    "and accurate answer. "
)
_IN_THE_DOCUMENT = "based on the world described in the document."
_IN_THE_WORLD = "based on the real-world knowledge and facts up until your last training"

TASKS = {
    task.name: task
    for task in (
        Task(
            "coursera",
            system=_LONG + "For multi-choice questions, there could be a sinlge correct option or multiple correct "
            "options. Please only provide the letter corresponding to the answer (like A or AB) when answering. ",
            **_EXAM,
        ),
        Task("quality", system=_ONE_LETTER, **_EXAM),
        Task("tpo", system=_ONE_LETTER, **_EXAM),
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
        Task(
            "codeU",
            system="Now you are given a code base consisting of a large amount of functions and the corresponding "
            "comments. In the end, I will call some functions defined in the code base. Please carefully read these "
            "codes and comments and answer the question.",
            cut="beginning",
            **_BELOW,
        ),
        Task(
            "sci_fi",
            system="Now you are given a scientific fiction. I will ask you some questions and the answer should be "
            '"True" or "False". Notice that you should answer the question based on the evidence in the document '
            "instead of your background knowledge.",
            **_EXAM,
        ),
    )
}
"""Task -> how it is asked (Baselines/LEval_config.py and llama2-chat-test.py of L-Eval)."""


def make_samples(name: str, row: Mapping[str, Any], identity: str) -> list[Sample]:
    """One sample a question of a row, in sci_fi two: input, instructions, outputs. ValueError where they do not fit
    together."""
    task = TASKS[name]
    document = text_field(row, "input")
    questions, answers = text_list(row, "instructions"), text_list(row, "outputs")
    if len(questions) != len(answers):
        raise ValueError(f"{len(questions)} instructions and {len(answers)} outputs: one answer a question is expected")
    found = []
    for number, (question, answer) in enumerate(zip(questions, answers, strict=True), start=1):
        where, about_world = f"{identity}, question {number}", ""
        if name == "sci_fi":
            answer, about_world = _two_answers(answer, where)
        found.append(
            Sample(
                task=name,
                identity=where,
                system=task.system,
                before=task.before,
                body=document,
                cut=task.cut,
                after=task.after.replace("{question}", question),
                answer_start=task.answer_start,
                answers=(answer,),
                max_new_tokens=MAX_NEW_TOKENS,
            )
        )
        if about_world:
            found.append(
                Sample(
                    task=name,
                    identity=f"{where}, of the real world",
                    body=question.replace(_IN_THE_DOCUMENT, _IN_THE_WORLD),
                    cut="end",
                    chat=False,
                    answer_start=task.answer_start,
                    answers=(about_world,),
                    max_new_tokens=MAX_NEW_TOKENS,
                )
            )
    return found


def score(sample: Sample, prediction: str) -> Score:
    """Exact match as L-Eval scores it (Evaluation/auto_eval.py and em.py)."""
    answer = sample.answers[0]
    if sample.task in ("coursera", "quality", "tpo"):
        letters = _letters_of_answer(prediction, several=sample.task == "coursera")
        guessed = not letters
        if guessed and prediction:
            letters = "A"
        return Score(_exact_match(letters, _letters_of_reference(answer)), guessed=guessed)
    if sample.task == "gsm100":
        number = _number(prediction)
        return Score(_exact_match(number, _number(answer)))
    if sample.task == "codeU":
        return Score(_exact_match(_printed(prediction, answer), _plain_code(answer)))
    if sample.task == "sci_fi":
        return Score(_exact_match(_judgement(prediction), answer))
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


def _two_answers(output: str, where: str) -> tuple[str, str]:
    """`True [fact: False]` -> what is so in the document and in the world, in lower case."""
    found = re.fullmatch(r"(.*?)\s*\[fact:(.*)\]\s*", output.lower(), re.DOTALL)
    if found is None:
        raise ValueError(f"{where}: outputs = {output!r}: an answer and [fact: an answer] are expected")
    return found[1].strip(), found[2].strip()


def _judgement(prediction: str) -> str:
    """The first word that says true or false; no guess where none does."""
    words = prediction.lower().split()
    return next((saying for word in words for saying in ("true", "false") if saying in word), "<error>")


def _plain_code(text: str) -> str:
    """Printed values without what is written in several ways: commas, single quotes, backslashes, .0, spaces between
    brackets."""
    text = re.sub(r"\s+", " ", text)
    for old in (",", "'", "\\", ".0"):
        text = text.replace(old, "")
    return text.replace("] [", "][").replace("[ [", "[[").replace("] ]", "]]")


def _printed(prediction: str, answer: str) -> str:
    """The words of a prediction that may be the printed value: as many as the answer has and three more, after "the
    final output" or from the end."""
    text = _plain_code(prediction)
    for filler in ("will be", "of the code", "is", "would be", "the value of", "the result of", "printed"):
        text = text.replace(filler, "")
    count, named = len(answer.split()) + 3, "the final output"
    if named in text:
        return " ".join(re.split(r"\s+", text.rpartition(named)[2])[:count])
    return " ".join(re.split(r"\s+", text)[-count:])


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
