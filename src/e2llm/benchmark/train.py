"""`e2llm benchmark train`: our trainer beside what people would use instead, as ratios within one run on one card.

Flows in: a shape, trainers, batch sizes. Flows out: a Record, saved after every contestant. Each contestant runs in a
process of its own under a time limit; rounds repeat the whole list (A B C A B C). One that fails is said and named in
the Record's config, the others are measured; one that runs out of memory is no failure. Knows no torch: no context of
this process takes the card's memory.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from e2llm.benchmark.shapes import shape_of
from e2llm.benchmark.train_contestants import (
    DEFAULT_TRAINERS,
    FULL_LENGTH,
    POSITIONS,
    TRAINERS,
    Contestant,
    check_parallelism,
    recipe_of,
)
from e2llm.benchmark.train_process import FAILED, MEASURED, OUT_OF_MEMORY, TOO_LONG, run_in_process
from e2llm.benchmark.train_rows import Measurement, rows_of
from e2llm.records import Record, portable, write_atomic

Progress = Callable[[str], None]
LIMIT_SECONDS = 600.0
NEVER = float("inf")
PROFILED_STEPS = 5
KEPT = "measured"
"""Folder, inside `work`, of what was found: a file for each contestant and round."""


@dataclass(frozen=True, kw_only=True)
class TrainBenchConfig:
    """What is measured."""

    shape: str
    trainers: tuple[str, ...] = DEFAULT_TRAINERS
    """Names; name:1,2 gives one its own batch sizes."""
    windows: tuple[int, ...] = (4096,)
    """Tokens of a training window."""
    batch_sizes: tuple[int, ...] = ()
    """Windows in a step of each GPU; each trainer's fastest counts. Empty: the shape's own."""
    gpus: tuple[int, ...] = (1,)
    """Numbers of GPUs. Our own trainers are measured on each, peers on one."""
    parallelism: tuple[str, ...] = ("ddp", "fsdp2")
    """Ways of spreading a run over several GPUs (`train_contestants.PARALLELISM`)."""
    steps: int = 20
    """Steps that are counted."""
    warmup: int = 8
    """Steps before them: compilation, and memory that is asked for once."""
    block: int = 5
    """Steps of one figure; a row is the median of these."""
    rounds: int = 1
    """Passes over all contestants, each in new processes."""
    method: str = "yarn"
    settings: tuple[str, ...] = ()
    """key=value, for the recipe of our own trainers."""
    checkpointing: bool = False
    """Recompute activations in the backward pass, for every trainer."""
    figure1: bool = False
    """Instead of trainers: ours at `windows` against training at each of `full_windows`."""
    full_windows: tuple[int, ...] = (16_384, 32_768, 65_536, 131_072)
    """Windows of full-length training."""
    checkpoint_from: int = 0
    """Full-length windows of this size and above recompute activations from the start; smaller ones, and all with 0,
    only where memory runs out without."""
    profile: bool = False
    """Run some more steps of `e2llm` under the profiler, after the counted ones."""
    time_limit: float = LIMIT_SECONDS
    """Seconds that a contestant may take, start-up and compilation included."""
    until: float = NEVER
    """Seconds after which no other contestant starts; who is left is named."""
    resume: bool = False
    """Take what an earlier call in the same folder has measured of the same contestants, and who failed by an error of
    its own."""

    def __post_init__(self) -> None:
        shape_of(self.shape)
        for trainer in self.trainers:
            name, _ = split_trainer(trainer)
            if name not in TRAINERS:
                raise ValueError(f"trainers = {trainer!r}: no such trainer; choose from {', '.join(TRAINERS)}")
        if not contestants(self):
            raise ValueError(f"trainers = {self.trainers}, windows = {self.windows}: give at least one of each")
        for name in ("steps", "block", "rounds", "warmup"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: use at least 1")
        for name in ("batch_sizes", "windows", "full_windows", "gpus"):
            if any(value < 1 for value in getattr(self, name)):
                raise ValueError(f"{name} = {list(getattr(self, name))}: use numbers of at least 1")
        if not self.gpus or (max(self.gpus) > 1 and not self.parallelism):
            raise ValueError(f"gpus = {list(self.gpus)}, parallelism = {list(self.parallelism)}: give at least one")
        for gpus, way in _spreads(self):
            if gpus > 1:
                check_parallelism(way, gpus)
        if max(self.gpus) > 1 and self.figure1:
            raise ValueError(f"gpus = {list(self.gpus)}: figure1 is measured on one")
        if self.block > self.steps:
            raise ValueError(f"block = {self.block}: more than steps = {self.steps}; use a smaller block or more steps")
        if self.time_limit <= 0 or self.until <= 0:
            raise ValueError(f"time_limit = {self.time_limit}, until = {self.until}: use seconds above 0")
        if self.profile and all(one.trainer != "e2llm" for one in contestants(self)):
            raise ValueError("profile: e2llm is the one that is profiled; add it to trainers")
        others = [name for name in self.trainers if name.partition(":")[0] not in POSITIONS]
        if shape_of(self.shape).quantization != "none" and others and not self.figure1:
            raise ValueError(f"trainers = {others}: shape {self.shape!r} has 4-bit weights; give e2llm alone")
        names = [one.name for one in contestants(self)]
        if len(set(names)) < len(names):
            raise ValueError(f"trainers, windows, batch_sizes: each contestant once; {', '.join(names)}")
        for one in contestants(self):  # settings that a recipe refuses are refused before anything runs
            recipe_of(one, Path("text"), Path("work"))


def contestants(config: TrainBenchConfig) -> list[Contestant]:
    """Who runs, in order."""
    batch_sizes = config.batch_sizes or (shape_of(config.shape).batch_size,)
    names = ("shape", "steps", "warmup", "block", "method", "settings", "checkpointing")
    common: dict[str, Any] = {name: getattr(config, name) for name in names}
    profiled = PROFILED_STEPS if config.profile else 0
    if config.figure1:
        ours = [Contestant(trainer="e2llm", window=w, batch_size=1, profile=profiled, **common) for w in config.windows]
        return [
            *map(_shorter, ours),
            *(_shorter(_full(config, window, common)) for window in config.full_windows),
        ]
    return [
        Contestant(
            trainer=name,
            window=window,
            batch_size=batch_size,
            profile=profiled * (name == "e2llm" and gpus == 1),
            gpus=gpus,
            parallelism=parallelism,
            **common,
        )
        for window in config.windows
        for gpus, parallelism in _spreads(config)
        for name, own in map(split_trainer, config.trainers)
        if gpus == 1 or name in POSITIONS
        for batch_size in sorted(own or batch_sizes)
    ]


def _spreads(config: TrainBenchConfig) -> list[tuple[int, str]]:
    """(GPUs, parallelism), fewest GPUs first."""
    found = []
    for gpus in sorted(set(config.gpus)):
        found += [(1, "none")] if gpus == 1 else [(gpus, way) for way in config.parallelism]
    return found


def split_trainer(text: str) -> tuple[str, tuple[int, ...]]:
    """e2llm -> (e2llm, ()); hf:1,2 -> (hf, (1, 2)). Raises ValueError."""
    name, colon, numbers = text.partition(":")
    parts = numbers.split(",") if colon else []
    if not all(part.isascii() and part.isdigit() and int(part) for part in parts):
        raise ValueError(f"trainers = {text!r}: write batch sizes of at least 1 as {name}:1,2")
    return name, tuple(map(int, parts))


def _full(config: TrainBenchConfig, window: int, common: dict[str, Any]) -> Contestant:
    recompute = config.checkpointing or 0 < config.checkpoint_from <= window
    return Contestant(trainer=FULL_LENGTH, window=window, batch_size=1, **{**common, "checkpointing": recompute})


def _shorter(one: Contestant) -> Contestant:
    """Steps for as many tokens as at 4096: a step at 128k takes most of a minute on one GPU. Two at least."""
    share = 4096 / max(4096, one.window)
    steps = max(2, round(one.steps * share))
    return replace(
        one, steps=steps, warmup=max(1, round(one.warmup * share)), block=max(1, min(round(one.block * share), steps))
    )


def benchmark_train(
    config: TrainBenchConfig,
    *,
    progress: Progress = lambda line: None,
    save: Callable[[Record], Any] = lambda record: None,
    work: Path | None = None,
) -> Record:
    """Run every contestant; `save` gets what there is after each. `work`: a folder that keeps tokens, compiled kernels
    and what was measured between calls; left out, they are made anew and removed. Raises ValueError where that folder
    holds results of another GPU and `config.resume` would take them, and for more GPUs than are here."""
    from torch.cuda import device_count  # torch is slow to load, and a config is checked without

    here = device_count()
    if 0 < here < max(config.gpus):  # without any, processes on the CPU
        raise ValueError(f"gpus = {list(config.gpus)}: GPUs here: {here}; leave out what is more")
    if config.resume and work is None:
        raise ValueError("resume: what was measured lies in the folder of the earlier call; give it as work")
    with tempfile.TemporaryDirectory(prefix="e2llm-benchmark-") as temporary:
        session = _Session(config, work or Path(temporary), progress, save)
        for number in range(config.rounds):
            for one in contestants(config):
                session.run(one, number)
        return session.record()


def _digest(one: Contestant, number: int) -> str:
    return hashlib.sha256(json.dumps([asdict(one), number], sort_keys=True).encode()).hexdigest()[:24]


class _Session:
    """What has been found so far."""

    def __init__(self, config: TrainBenchConfig, work: Path, progress: Progress, save: Callable[[Record], Any]) -> None:
        self.config, self.work, self.progress, self.save = config, work.resolve(), progress, save
        self.measured: list[Measurement] = []
        self.failed: dict[str, str] = {}
        self._environment: dict[str, Any] | None = None
        self.out_of_memory: list[str] = []
        self.not_run: list[str] = []
        self._too_large: dict[tuple[str, bool, int, str], int] = {}
        self._begin = time.monotonic()

    def run(self, one: Contestant, number: int) -> None:
        """One contestant in one round; what cannot run any more is left out and said."""
        if one.name in self.failed:
            return
        if one.name in self.out_of_memory:
            self._retry(one, number)
            return
        kind = (one.trainer, one.checkpointing, one.gpus, one.parallelism)
        tokens = one.batch_size * one.window
        if tokens >= self._too_large.get(kind, tokens + 1):  # fewer tokens did not fit
            self.out_of_memory.append(one.name)
            self._retry(one, number)
            return
        found = self._result(one, number)
        if found is None:
            return
        if found["status"] == OUT_OF_MEMORY:
            self.out_of_memory.append(one.name)
            self._too_large[kind] = tokens
            self._say(one, "out of memory")
            self._retry(one, number)
        elif found["status"] == MEASURED:
            self.measured.append(Measurement(one, number, found))
            self._say(one, f"{self.measured[-1].tokens_per_second:,.0f} tokens/s")
        self.save(self.record())

    def _retry(self, one: Contestant, number: int) -> None:
        """Full-length training that does not fit is tried with activations recomputed."""
        if one.trainer == FULL_LENGTH and not one.checkpointing:
            self.run(replace(one, checkpointing=True), number)

    def _result(self, one: Contestant, number: int) -> dict[str, Any] | None:
        name = one.name
        kept = self.work / KEPT / f"{_digest(one, number)}.json"
        if self.config.resume and kept.is_file():
            found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
            self._here(one, found)
            if found["status"] == FAILED:
                self.failed[name] = found["why"]
                self.progress(f"{name} failed before: {found['why']}")
            return found
        left = self.config.until - (time.monotonic() - self._begin)
        if left <= 0:
            if name not in self.not_run:
                self.not_run.append(name)
            return None
        limit = min(self.config.time_limit, max(left, 1.0))
        found = run_in_process(one, work=self.work, time_limit=limit)
        self._here(one, found)
        if "environment" in found:  # a word of its own: what was ended, or lacks a package, is tried again
            write_atomic(kept, json.dumps(found))
        if found["status"] == TOO_LONG and limit < self.config.time_limit:
            self.not_run.append(name)  # it had less time than it may take
        elif found["status"] in (FAILED, TOO_LONG):
            self.failed[name] = found["why"]
            self.progress(f"{name} failed: {found['why']}")
        return found

    def _here(self, one: Contestant, found: dict[str, Any]) -> None:
        """Remember where contestants run. Raises ValueError where a result of an earlier call is of another GPU."""
        where = found.get("environment")
        self._environment = self._environment or where
        if where and self._environment and where.get("gpu") != self._environment.get("gpu"):
            raise ValueError(
                f"work = {str(self.work)!r}: {one.name} was measured on {where.get('gpu')}, others on "
                f"{self._environment.get('gpu')}; remove {self.work / KEPT}, or use another folder"
            )
        if where and self._environment and where.get("gpus", 0) > self._environment.get("gpus", 0):
            self._environment = where  # each sees the GPUs that it uses: the most say what was used in all

    def _say(self, one: Contestant, what: str) -> None:
        self.progress(f"{time.monotonic() - self._begin:5.0f} s  {one.shape}: {one.name}: {what}")

    def record(self) -> Record:
        """Rows: medians over blocks of steps. Examples: every block, and the longest kernels of the profile."""
        settings = {m.contestant.name: m.result["settings"] for m in self.measured}
        facts = {
            "until": None if self.config.until == NEVER else self.config.until,
            "order": "one contestant after another, each in a process of its own; rounds repeat the list",
            "text": f"the standard library of Python {sys.version_info.major}.{sys.version_info.minor}",
            "memory": "CUDA allocator's peak over the whole run"
            if any(m.result["device"] == "cuda" for m in self.measured)
            else "resident memory of the whole process at its peak",
            "weights_are": "trained, frozen",
            "interval": "low and high are the fastest and the slowest block",
            "trainer_settings": settings,
            "weights": {m.contestant.name: [m.result["trained"], m.result["frozen"]] for m in self.measured},
            "warm_after_seconds": {m.contestant.name: m.result["warm_after_seconds"] for m in self.measured},
            "failed": dict(self.failed),
            "out_of_memory": list(self.out_of_memory),
            "not_run": list(self.not_run),
        }
        rows, examples = rows_of(self.measured, figure1=self.config.figure1)
        environment: dict[str, Any] = {"environment": self._environment} if self._environment else {}
        config = portable({**asdict(self.config), **facts})
        return Record(kind="benchmark_train", config=config, rows=rows, examples=examples, **environment)
