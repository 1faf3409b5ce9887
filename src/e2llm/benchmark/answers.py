"""`e2llm benchmark answers`: how fast an evaluation answers long prompts, against reading as many tokens and no more.

Flows in: a checkpoint, or a shape with random weights. Flows out: a Record. What is timed is the evaluation's own
`replies`, on random tokens: prompts of about a window's length, a fixed number of new tokens each. Batches and sizes of
a step take turns. Making the serving engine, which every call does, is timed with prompts of a few tokens.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from e2llm.benchmark.contestants import vocabulary_of
from e2llm.benchmark.evaluate import ModelChoice, open_engine
from e2llm.benchmark.kernels import kernel_times, seconds_by_class
from e2llm.evaluate.batched import Asked, replies
from e2llm.evaluate.logits import TokenScorer
from e2llm.infer import Engine, RequestPlan
from e2llm.records import Record, make_row, portable

UNITS = {"tokens_per_second": "tokens/s", "seconds_per_prompt": "s", "ratio_to_reading": "ratio", "start_seconds": "s"}
SHORT_PROMPT = 32
"""Tokens of the prompts that time the start."""


@dataclass(frozen=True, kw_only=True)
class AnswerSpeedConfig(ModelChoice):
    """Sizes of the measurement."""

    windows: tuple[int, ...] = (8192, 32_768)
    """Tokens of a prompt with its answer."""
    prompts: int = 16
    new_tokens: int = 40
    batches: tuple[int, ...] = (8,)
    """Prompts answered at once; 1: without the serving engine."""
    chunk_tokens: tuple[int, ...] = (4096, 32_768)
    """Prompt tokens that a step of the serving engine reads at most."""
    rounds: int = 3
    """Rounds after the one that warms up."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("prompts", "new_tokens", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: use at least 1")
        for name in ("batches", "chunk_tokens"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise ValueError(f"{name} = {list(getattr(self, name))}: give numbers of at least 1")
        shortest = self.new_tokens + self.prompts + SHORT_PROMPT
        if not self.windows or min(self.windows) < shortest:
            raise ValueError(f"windows = {list(self.windows)}: give lengths of at least {shortest} tokens")

    @property
    def ways(self) -> list[tuple[int, int]]:
        """(batch, chunk tokens); one at a time knows no chunks."""
        found = [(b, c) for b, c in itertools.product(self.batches, self.chunk_tokens) if b > 1]
        return found + ([(1, 0)] if 1 in self.batches else [])


def benchmark_answers(
    config: AnswerSpeedConfig,
    *,
    progress: Callable[[str], None] = lambda line: None,
    save: Callable[[Record], Any] = lambda record: None,
    profile: Path | None = None,
) -> Record:
    """Measure every window, all ways in turn; `save` gets what there is after every window.

    `profile`: a file that gets the longest kernels of one more round, of the last window and way.
    """
    engine = open_engine(config)
    found: dict[tuple[int, int, int], list[dict[str, float]]] = {}
    record = _record(config, engine, found)
    for window in config.windows:
        reading = _reading_seconds(engine, config, window)
        progress(f"{window}: read alone {reading:.4g} s a prompt")
        for number in range(config.rounds + 1):
            for batch, chunk in config.ways:
                one = _round(engine, config, window, batch, chunk, number)
                if number:
                    one["ratio_to_reading"] = reading / one["seconds_per_prompt"]
                    found.setdefault((window, batch, chunk), []).append(one)
                    progress(f"  {window} {batch} {chunk}: " + ", ".join(f"{k} {v:.4g}" for k, v in one.items()))
        record = _record(config, engine, found)
        save(record)
    if profile is not None:
        batch, chunk = config.ways[-1]
        asked = _asked(engine, config, config.windows[-1], 0)
        activities = [torch.profiler.ProfilerActivity.CPU]
        if engine.model.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities) as profiler:
            seconds = _seconds(engine, asked, batch, chunk)
        kernels = kernel_times(profiler, 1)
        lines = [f"{kind:40} {spent:8.3f} s" for kind, spent in seconds_by_class(kernels, seconds).items()]
        lines += [f"{one.seconds:8.3f} s {one.calls:9.0f} x {one.name}" for one in kernels[:40]]
        profile.write_text("\n".join([f"{seconds:.3f} s in all", *lines, ""]), encoding="utf-8")
    return record


def _asked(engine: Engine, config: AnswerSpeedConfig, window: int, number: int) -> list[Asked]:
    """Prompts of lengths that all differ, as real ones do."""
    draw = np.random.default_rng([config.seed, window, number])
    vocabulary = vocabulary_of(engine.model)
    scale = max(1.0, window / engine.native_window)
    plan = RequestPlan(scale, window, config.new_tokens, ())
    lengths = [window - config.new_tokens - index for index in range(config.prompts)]
    return [Asked(draw.integers(0, vocabulary, length).tolist(), plan) for length in lengths]


def _round(
    engine: Engine, config: AnswerSpeedConfig, window: int, batch: int, chunk: int, number: int
) -> dict[str, float]:
    asked = _asked(engine, config, window, number)
    short = [Asked(one.token_ids[:SHORT_PROMPT], one.plan) for one in asked[:1]]
    start = 0.0 if batch == 1 else _seconds(engine, short, batch, chunk)
    seconds = _seconds(engine, asked, batch, chunk)
    tokens = sum(len(one.token_ids) for one in asked)
    return {
        "tokens_per_second": tokens / seconds,
        "seconds_per_prompt": seconds / len(asked),
        "start_seconds": start,
    }


def _seconds(engine: Engine, asked: list[Asked], batch: int, chunk: int) -> float:
    begin = time.perf_counter()
    answers = list(replies(engine, asked, batch=batch, chunk_tokens=chunk or None))  # texts: the device is done
    assert len(answers) == len(asked)
    return time.perf_counter() - begin


def _reading_seconds(engine: Engine, config: AnswerSpeedConfig, window: int) -> float:
    """A window read whole and its last token scored, the median of rounds."""
    draw = np.random.default_rng([config.seed, window])
    ids = torch.from_numpy(draw.integers(0, vocabulary_of(engine.model), (1, window))).to(engine.model.device)
    scorer, times = TokenScorer(engine), []
    with engine.at_scale(max(1.0, window / engine.native_window)):
        for _ in range(config.rounds + 1):
            begin = time.perf_counter()
            float(scorer.nats(ids, first=window - 1).sum())  # read back: the device is done
            times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def _record(
    config: AnswerSpeedConfig, engine: Engine, found: dict[tuple[int, int, int], list[dict[str, float]]]
) -> Record:
    """Rows: medians. Examples: every round's figures."""
    rows, examples = [], []
    for (window, batch, chunk), rounds in found.items():
        labels = {"base_model": config.label, "protocol": "answers", "window": window}
        labels |= {"batch_size": batch, "chunk_tokens": chunk}
        for metric in rounds[0]:
            values = [one[metric] for one in rounds]
            rows.append(make_row(metric, statistics.median(values), UNITS[metric], len(values), **labels))
            examples += [{**labels, "metric": metric, "round": n, "value": value} for n, value in enumerate(values)]
    facts = {
        "device": engine.model.device.type,
        "dtype": str(engine.model.dtype).removeprefix("torch."),
        "method": engine.extension.method,
    }
    return Record(kind="answer_speed", config=portable({**asdict(config), **facts}), rows=rows, examples=examples)
