"""Multiple-choice tasks on short text, made from whole documents: which of four sentences comes next?

    python benchmarks/short_tasks.py --text DIR --out tasks/short [--questions 50]

DIR of --text holds the folders mathematics and novels. Flows out: a folder of the EleutherAI harness' YAML tasks with
their data beside, for `e2llm evaluate --suite short --tasks-folder`. A question is about 100 words of a document; the
wrong answers are sentences of the same document, far away and of about the same length. The same text gives the same
questions. They say whether training cost what the base could do on short text; they compare with no published figure.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from e2llm.records import write_atomic

CORPORA = ("mathematics", "novels")
CHOICES = 4
CONTEXT_WORDS = 100
SENTENCE_WORDS = (8, 40)
"""Fewest and most words of an answer."""
APART = 20
"""Sentences between the right answer and a wrong one, at least."""
_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"“‘'])")


def sentences_of(text: str) -> list[str]:
    """The sentences of a text in order, white space made single spaces."""
    return [" ".join(sentence.split()) for sentence in _END.split(text)]


def questions_of(name: str, text: str, count: int) -> list[dict[str, Any]]:
    """Up to `count` questions of one document, fewer where it has too few sentences of a fitting length."""
    rng = random.Random(name)
    sentences = sentences_of(text)
    lengths = [len(sentence.split()) for sentence in sentences]
    low, high = SENTENCE_WORDS
    fitting = [index for index, length in enumerate(lengths) if low <= length <= high]
    found: list[dict[str, Any]] = []
    for index in rng.sample(fitting, len(fitting)):
        context = _before(sentences, lengths, index)
        near = [
            other
            for other in fitting
            if abs(other - index) >= APART
            and abs(lengths[other] - lengths[index]) <= 2
            and sentences[other] != sentences[index]
        ]
        if not context or len(near) < CHOICES - 1:
            continue
        choices = [sentences[index], *(sentences[other] for other in rng.sample(near, CHOICES - 1))]
        if len(set(choices)) < CHOICES:
            continue
        order = rng.sample(range(CHOICES), CHOICES)
        found.append(
            {
                "document": name,
                "context": context,
                "choices": [choices[place] for place in order],
                "label": order.index(0),
            }
        )
        if len(found) == count:
            break
    return found


def _before(sentences: Sequence[str], lengths: Sequence[int], index: int) -> str:
    """The sentences before `index`, of CONTEXT_WORDS words or little more; empty where there are fewer."""
    start, words = index, 0
    while start > 0 and words < CONTEXT_WORDS:
        start -= 1
        words += lengths[start]
    return " ".join(sentences[start:index]) if CONTEXT_WORDS <= words <= 3 * CONTEXT_WORDS else ""


def write_task(corpus: str, questions: Sequence[dict[str, Any]], folder: Path) -> Path:
    """The YAML file of one corpus, its data beside."""
    name = f"next_sentence_{corpus}"
    data = write_atomic(folder / f"{name}.json", json.dumps(questions, ensure_ascii=False, indent=1))
    return write_atomic(
        folder / f"{name}.yaml",
        f"task: {name}\n"
        "dataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {json.dumps(str(data.resolve()))}\n"
        "test_split: test\n"
        "output_type: multiple_choice\n"
        'doc_to_text: "{{context}}"\n'
        'doc_to_choice: "{{choices}}"\n'
        "doc_to_target: label\n"
        "metric_list:\n  - metric: acc\n  - metric: acc_norm\n",
    )


def main() -> None:
    """One task a corpus."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--questions", type=int, default=50, help="of each document (50)")
    args = parser.parse_args()
    for corpus in CORPORA:
        files = sorted((args.text / corpus).rglob("*.txt"))
        questions = [q for f in files for q in questions_of(f.name, f.read_text(encoding="utf-8"), args.questions)]
        if not questions:
            parser.error(f"--text {args.text}: no question can be made of the {len(files)} documents in {corpus}/")
        print(f"{write_task(corpus, questions, args.out)}: {len(questions)} questions of {len(files)} documents")


if __name__ == "__main__":
    main()
