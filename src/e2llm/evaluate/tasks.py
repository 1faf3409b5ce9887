"""What is hidden in a text and asked for at its end: the wording of each retrieval task, and how an answer is judged.

A fact is a name and a value. `{name}` and `{value}` in the wording are the asked fact's, in `statement` each fact's.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Task:
    """One kind of question. No part of its wording occurs in the package's synthetic training text."""

    name: str
    introduction: str
    """Before the text: what is asked for is announced, as a model that only continues text cannot know otherwise that
    a statement in it matters."""
    statement: str
    """One hidden fact."""
    question: str
    answer_start: str
    """What the answer begins with; the model goes on from there."""
    num_facts: int
    """Facts hidden, one of which is asked for."""
    draw: Callable[[np.random.Generator], tuple[str, str]]
    """Name and value of one fact."""
    answer: str
    """What the model is to write, with what may surround the value: it decides how many tokens the answer may take."""
    accepted: str
    """Regular expression, matched at the beginning of what the model wrote."""

    def is_correct(self, written: str, expected: str) -> bool:
        """Whether the continuation begins with exactly the expected value."""
        return re.match(self.accepted.replace("{value}", re.escape(expected)), written) is not None


def _digits(random: np.random.Generator) -> tuple[str, str]:
    return "", str(random.integers(10_000, 100_000))


def _uuids(random: np.random.Generator) -> tuple[str, str]:
    name, value = (str(uuid.UUID(bytes=random.bytes(16), version=4)) for _ in range(2))
    return name, value


PASS_KEY = Task(
    name="pass_key",
    # Mohtashami & Jaggi 2023 (arXiv 2305.16300, Sect. 4.2). Deviations: real text as filler in place of their repeated
    # sentences, a blank line between the parts, "memorize it" for "memorize them".
    introduction="There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there.\n\n",
    statement="\n\nThe pass key is {value}. Remember it. {value} is the pass key.\n\n",
    question="\n\nWhat is the pass key?",
    answer_start=" The pass key is",
    num_facts=1,
    draw=_digits,
    answer=" {value}",
    accepted=r"\s*{value}(?!\d)",
)
UUID_KV = Task(
    name="uuid_kv",
    # E2-LLM (arXiv 2401.06951) Fig. 6: three UUID pairs in a long text, one asked for. The question's wording is that
    # of Liu et al. 2023 (Lost in the Middle, arXiv 2307.03172, Fig. 4).
    introduction="Extract the value corresponding to the specified key in the text below.\n\n",
    statement='\n\n"{name}": "{value}"\n\n',
    question='\n\nKey: "{name}"',
    answer_start="\nCorresponding value:",
    num_facts=3,
    draw=_uuids,
    answer=' "{value}"',
    accepted=r"[\s\"]*{value}(?![0-9a-f-])",
)
TASKS = {task.name: task for task in (PASS_KEY, UUID_KV)}
