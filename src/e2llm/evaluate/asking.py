"""Samples of a task become answers, each kept beside the output as soon as it is there.

Flows in: samples, a column of the table (`Cell`), an engine. Flows out: for each sample how it was asked and what came
back, or why it could not be asked. Knows no score.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from e2llm.evaluate.batched import Asked, groups, replies
from e2llm.evaluate.measure import fingerprint
from e2llm.evaluate.partial import Finished
from e2llm.evaluate.prompting import Prompt, Prompter
from e2llm.evaluate.samples import Sample
from e2llm.infer import Engine, RequestPlan
from e2llm.version import __version__


@dataclass(frozen=True)
class Cell:
    """One column of a table: a window read at a scale; None: each prompt at its own."""

    window: int
    scale: float | None

    def __str__(self) -> str:
        return f"window {self.window} " + ("each at its own scale" if self.scale is None else f"scale {self.scale:g}")


@dataclass(frozen=True)
class AskedAs:
    """What is kept of a prompt, whose tokens are many."""

    prompt_tokens: int
    prompt_sha256: str
    cut_tokens: int
    through_template: bool
    scale: float


@dataclass(frozen=True)
class Answered:
    """One sample with what the model wrote."""

    sample: Sample
    asked: AskedAs
    answer: str
    new_tokens: int
    finish_reason: str


Planned = tuple[Prompt, RequestPlan]
Found = tuple[AskedAs, str, int, str]
"""How a sample was asked; answer, new tokens and finish reason."""


class Asker:
    """Asks samples and remembers answers in the file of finished parts."""

    def __init__(self, engine: Engine, prompter: Prompter, done: Finished, batch: int) -> None:
        self.engine, self.prompter, self.done, self.batch = engine, prompter, done, batch
        self._weights = fingerprint(engine)

    def __call__(self, samples: Sequence[Sample], cell: Cell, advance: Callable[[], None]) -> list[Found | str]:
        """For each sample its answer, or why no prompt can be made. `advance` is called once a sample.

        Prompts are made for few samples at a time (`batched.groups`).
        """
        found: list[Found | str] = []
        for some in groups(samples, window=cell.window, batch=self.batch):
            found += self._ask(some, [self._plan(sample, cell) for sample in some], advance)
        return found

    def _plan(self, sample: Sample, cell: Cell) -> Planned | str:
        try:
            prompt = self.prompter.prompt(sample, cell.window - sample.max_new_tokens)
        except ValueError as error:
            return str(error)
        if cell.scale is None:
            return prompt, self.engine.plan(len(prompt.token_ids), max_new_tokens=sample.max_new_tokens)
        return prompt, RequestPlan(cell.scale, cell.window, sample.max_new_tokens)

    def _ask(
        self, samples: Sequence[Sample], planned: Sequence[Planned | str], advance: Callable[[], None]
    ) -> Iterator[Found | str]:
        keys = ["" if isinstance(one, str) else self._key(*one) for one in planned]
        missing = [
            Asked(one[0].token_ids, one[1])
            for one, key in zip(planned, keys, strict=True)
            if not isinstance(one, str) and self.done.get(key) is None
        ]
        answers = replies(self.engine, missing, batch=self.batch)
        for sample, one, key in zip(samples, planned, keys, strict=True):
            advance()
            if isinstance(one, str):
                yield one
                continue
            result = self.done.get(key)
            if result is None:
                reply = next(answers)
                result = {
                    "answer": reply.text,
                    "new_tokens": reply.new_tokens,
                    "finish_reason": reply.finish_reason,
                }
                self.done.add(key, {"task": sample.task, "sample": sample.identity}, result)
            yield _asked_as(*one), result["answer"], result["new_tokens"], result["finish_reason"]

    def _key(self, prompt: Prompt, plan: RequestPlan) -> str:
        asked = [__version__, self._weights, self.batch > 1, plan.scale, plan.max_new_tokens, prompt.token_ids]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def _asked_as(prompt: Prompt, plan: RequestPlan) -> AskedAs:
    digest = hashlib.sha256(json.dumps(prompt.token_ids).encode()).hexdigest()[:16]
    return AskedAs(len(prompt.token_ids), digest, prompt.cut_tokens, prompt.through_template, plan.scale)
