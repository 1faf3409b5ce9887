"""Which of a prompt's long codes a checkpoint answers with, and whether the wording matters.

    python benchmarks/code_answers.py MODEL [LABEL=MODEL …] --text DIR --out code_answers.json

Prompts hide three pairs of codes in documents (DIR/eval/<--corpus>) and ask for one, as uuid_kv does. `--wordings`
says pairs and question in other words, some of them those of planted codes (data.synthetic_codes): where a model finds
the value in one wording and not in another, it has learned the wording. Every answer is sorted by its first
characters: the right value, another pair's value, the asked name, another pair's name, or none of them. `--share` moves
the weights between those of --base and the checkpoint's (train.interpolation), to see what a part of the way gives.
Writes a Record.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from e2llm.data.synthetic import Draw
from e2llm.data.synthetic_codes import LONG, alike
from e2llm.evaluate.command import window_tokens
from e2llm.evaluate.documents import Document, load_documents
from e2llm.evaluate.retrieval import RetrievalPrompt, answers, make_prompts
from e2llm.evaluate.run import scale_of
from e2llm.evaluate.tasks import UUID_KV, Task
from e2llm.hf import load_model
from e2llm.infer import Engine
from e2llm.intervals import interval_fields, wilson
from e2llm.records import Record, make_row, portable

KINDS = ("right", "other value", "asked name", "other name", "none")
PREFIX = 6
"""Characters that say which code an answer is; of six codes hardly two begin alike."""
ANSWER_TOKENS = 16
"""Enough for the first characters in any tokenizer."""


def _pair(random: np.random.Generator) -> tuple[str, str]:
    """Two long codes of one form, as in planted sets, that an answer's first characters tell apart."""
    while True:
        name, value = alike(Draw(int(random.integers(2**31))), 2, LONG)
        if name[:PREFIX] != value[:PREFIX]:
            return name, value


def _worded(name: str, statement: str, question: str, start: str, **changes: Any) -> Task:
    return dataclasses.replace(
        UUID_KV, name=name, statement=f"\n{statement}\n", question=f"\n\n{question}", answer_start=start, **changes
    )


PLAIN: dict[str, Any] = {"introduction": "", "draw": _pair}
WORDINGS = {
    task.name: task
    for task in (
        UUID_KV,
        dataclasses.replace(UUID_KV, name="codes_asked_as_uuids", draw=_pair),
        _worded("uuids_asked_as_codes", '"{name}": "{value}"', "Look up {name}.", "\n", introduction=""),
        _worded("uuids_stated_as_codes", "{name} -> {value}", 'Key: "{name}"', "\nCorresponding value:"),
        _worded("arrow", "{name} -> {value}", "Look up {name}.", "\n", **PLAIN),
        _worded("sentence", "The code of {name} is {value}.", "Which code belongs to {name}? It is", "", **PLAIN),
        _worded("value_first", "{value} was given to {name}.", "Q: {name}?", "\nA:", **PLAIN),
        _worded("equals", "{name} = {value}", "{name} =", "", **PLAIN),
    )
}


def facts_of(prompt: RetrievalPrompt, task: Task) -> list[tuple[str, str]]:
    """The prompt's pairs, the asked one first: drawn again from what the prompt was drawn from."""
    random = np.random.default_rng([prompt.seed, prompt.window, prompt.index])
    facts = [task.draw(random) for _ in range(task.num_facts)]
    assert facts[0][1] == prompt.expected
    return facts


def kind_of(answer: str, facts: Sequence[tuple[str, str]]) -> str:
    """What an answer begins with, after spaces and quotes."""
    written = answer.lstrip(" \t\n\"'`<[(")
    codes = {}
    for index, (name, value) in enumerate(facts):
        codes[name] = "other name" if index else "asked name"
        codes[value] = "other value" if index else "right"
    if len(written) < PREFIX:
        return "none"
    return next((kind for code, kind in codes.items() if code[:PREFIX] == written[:PREFIX]), "none")


def measure(
    engine: Engine, documents: list[Document], task: Task, window: int, scale: float, args: argparse.Namespace
) -> list[str]:
    """The kind of every answer."""
    prompts = make_prompts(
        engine.tokenizer, documents, window=window, num_prompts=args.prompts, seed=args.seed, task=task
    )
    short = [dataclasses.replace(prompt, answer_tokens=ANSWER_TOKENS) for prompt in prompts]
    found = answers(engine, short, scale=scale, batch=args.batch_size)
    return [kind_of(answer, facts_of(prompt, task)) for prompt, answer in zip(prompts, found, strict=True)]


def rows_of(kinds: Sequence[str], **labels: Any) -> list[dict[str, Any]]:
    """The share of each kind, with its interval."""
    total = len(kinds)
    found = []
    for kind in KINDS:
        share = sum(one == kind for one in kinds) / total
        fields = {"kind": kind, **interval_fields(wilson(share, total)), **labels}
        found.append(make_row("share_of_answers", share, "share", total, **fields))
    return found


def move(model: torch.nn.Module, start: dict[str, torch.Tensor], end: dict[str, torch.Tensor], share: float) -> None:
    """Put the weights at `share` of the way from `start` to `end`."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.lerp(start[name].float(), end[name].float(), share))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoints", nargs="+", metavar="[LABEL=]MODEL")
    add("--text", type=Path, required=True)
    add("--corpus", default="novels")
    add("--windows", type=window_tokens, nargs="+", default=[window_tokens(w) for w in ("4k", "64k")])
    add("--wordings", nargs="+", choices=[*WORDINGS], default=[*WORDINGS])
    add("--prompts", type=int, default=60)
    add("--batch-size", type=int, default=8)
    add("--seed", type=int, default=0)
    add("--scale", type=float, help="read every window at this one: does the scale tell on answers, or the length?")
    add("--base", help="weights where the way begins, for --share")
    add("--share", type=float, nargs="+", default=[1.0])
    add("--out", type=Path, default=Path("code_answers.json"))
    args = parser.parse_args()
    if args.share != [1.0] and not args.base:
        parser.error(f"--share {args.share}: name the weights where the way begins with --base")
    return args


def main() -> int:
    """Every checkpoint, wording and window; the Record is written as it grows."""
    args = parse()
    rows: list[dict[str, Any]] = []
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "text")}
    for given in args.checkpoints:
        label, _, model = given.rpartition("=")
        label = label or Path(model).name
        engine = Engine.load(model)
        documents = load_documents(
            args.text / "eval" / args.corpus, engine.tokenizer, num_tokens=max(args.windows), max_documents=10
        )
        weights: dict[str, dict[str, torch.Tensor]] = {}
        if args.base:
            base = load_model(args.base, dtype=str(engine.model.dtype).removeprefix("torch."))[0]
            for name, one in (("start", base), ("end", engine.model)):
                weights[name] = {key: value.detach().clone() for key, value in one.named_parameters()}
        for share in args.share:
            if weights:
                move(engine.model, weights["start"], weights["end"], share)
            for window in args.windows:
                scale = args.scale or scale_of(engine, window)
                for wording in args.wordings:
                    kinds = measure(engine, documents, WORDINGS[wording], window, scale, args)
                    labels = {"checkpoint": label, "wording": wording, "window": window, "share": share}
                    rows += rows_of(kinds, corpus=args.corpus, scale=scale, **labels)
                    counts = ", ".join(f"{kind} {kinds.count(kind)}" for kind in KINDS)
                    print(f"{label} {share:g} {window:>6} {wording:22} {counts}", flush=True)
                    Record(kind="code_answers", config=portable(settings), rows=rows).save(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
