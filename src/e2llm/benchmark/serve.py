"""`e2llm benchmark serve`: what a scale per request costs, how the engine stands beside transformers' own, and how far
it is from what the machine can do.

Flows in: a checkpoint and sizes. Flows out: a Record. Contestants take turns, round after round, on the same prompts
(random tokens, no end of text); figures are medians over rounds, ratios are medians of each round's ratio, so that a
machine's slow minute falls out. The first round warms up and is not counted.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from e2llm.benchmark import contestants
from e2llm.benchmark.contestants import Round, TransformersBatch, random_prompts, vocabulary_of
from e2llm.engine import BatchEngine
from e2llm.hf import load_model
from e2llm.records import Record, make_row, portable

Contestant = tuple[str, str, int, int]
"""Labels: engine, mix, window (tokens), requests."""


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Sizes of the measurement."""

    model: str
    requests: int = 24
    """Requests in flight at once."""
    prompt_tokens: int = 128
    new_tokens: int = 64
    scales: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0)
    """Of the mixed batch, request after request; the single one runs at the first."""
    long_tokens: int = 0
    """A prompt of this length, behind which a short request waits for its first token; 0 leaves that out."""
    prefill: tuple[int, ...] = ()
    """Prompts of these lengths, each read alone, against the floor of their shapes."""
    decode: tuple[tuple[int, int], ...] = ()
    """(requests, prompt tokens) of batches whose decoding is set against the memory's bandwidth."""
    rounds: int = 5
    transformers: bool = True
    """Also run transformers' continuous batching on the same requests."""
    seed: int = 0
    dtype: str | None = None
    device: str | None = None
    attention: str = "auto"
    """Of the engine."""
    base_model: str = ""

    def __post_init__(self) -> None:
        for name in ("requests", "prompt_tokens", "new_tokens", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: use at least 1")
        if not self.scales or any(scale < 1 for scale in self.scales):
            raise ValueError(f"scales = {list(self.scales)}: give numbers of at least 1")
        if any(tokens < 1 for tokens in self.prefill) or any(min(pair) < 1 for pair in self.decode):
            raise ValueError(f"prefill = {list(self.prefill)}, decode = {list(self.decode)}: use at least 1")

    @property
    def kv_tokens(self) -> int:
        """Key-value slots that the largest measurement needs."""
        spare = 64  # ends of pages, and a few new tokens
        batch = self.requests * (self.prompt_tokens + self.new_tokens + spare)
        behind = self.long_tokens + self.prompt_tokens + 2 * spare
        decode = [count * (contestants.decode_window(count, tokens) + spare) for count, tokens in self.decode]
        return max([batch, behind, *(tokens + spare for tokens in self.prefill), *decode])


def benchmark_serve(
    config: ServeConfig,
    *,
    progress: Callable[[str], None] = lambda line: None,
    save: Callable[[Record], Any] = lambda record: None,
) -> Record:
    """Run all contestants; `save` gets what there is after every round.

    A contestant that fails is said, kept in the Record's config under `failed`, and left out from then on: the others
    go on. Raises ValueError for sizes that the engine refuses.
    """
    model, _, info = load_model(config.model, dtype=config.dtype, device=config.device)  # type: ignore[arg-type]
    options: dict[str, Any] = {"attention": config.attention, "kv_tokens": config.kv_tokens}
    # Without a tokenizer: transformers' continuous batching hands out tokens and makes no text of them either.
    engine = BatchEngine(model, None, info=info, prefix_cache=False, **options)
    failed: dict[Contestant, str] = {}
    try:
        running = _contestants(engine, config)
        rounds: dict[Contestant, list[Round]] = {name: [] for name in running}
        record = _record(config, engine, rounds, failed)
        for number in range(config.rounds + 1):
            names = list(running)
            first = number % max(1, len(names))  # who follows whom changes: threads that wind down slow the next one
            for name in names[first:] + names[:first]:
                try:
                    found = _timed(running[name], number, engine.model.device)
                except Exception as error:
                    failed[name] = f"{type(error).__name__}: {error}"
                    progress(f"{' '.join(map(str, name))} failed: {failed[name]}")
                    del running[name]
                    continue
                if number:
                    rounds[name].append(found)
                    progress(f"  {' '.join(map(str, name))}: " + ", ".join(f"{k} {v:.4g}" for k, v in found.items()))
            record = _record(config, engine, rounds, failed)
            save(record)
            progress(f"round {number} of {config.rounds}" + (" (warm-up)" if not number else ""))
        return record
    finally:
        engine.close()


def _timed(run: Callable[[int], Round], number: int, device: torch.device) -> Round:
    """A contestant's figures; on a CPU the processor's seconds as well, which other programs disturb less."""
    before = time.process_time()
    found = run(number)
    return found | ({"cpu_seconds": time.process_time() - before} if device.type == "cpu" else {})


def _contestants(engine: BatchEngine, config: ServeConfig) -> dict[Contestant, Callable[[int], Round]]:
    """Who takes turns, and how."""
    window, count = config.prompt_tokens + config.new_tokens, config.requests
    single = [config.scales[0]] * count
    mixed = [config.scales[i % len(config.scales)] for i in range(count)]
    vocabulary = vocabulary_of(engine.model)
    others = 0

    def prompts(number: int, many: int = count, tokens: int = config.prompt_tokens) -> list[tuple[int, ...]]:
        return random_prompts([config.seed, number], many, tokens, vocabulary)

    def batch(scales: list[float], number: int) -> Round:
        if engine.model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(engine.model.device)
        found = contestants.batch(engine, prompts(number), config.new_tokens, scales)
        peak = contestants.own_peak_bytes(engine.model, others)
        return found if peak is None else found | {"peak_memory_bytes": peak}

    found: dict[Contestant, Callable[[int], Round]] = {
        ("e2llm", "single", window, count): partial(batch, single),
        ("e2llm", "mixed", window, count): partial(batch, mixed),
    }
    if config.transformers:
        # Weights of its own: the engine's model attends over the engine's pages.
        peer = load_model(config.model, dtype=config.dtype, device=config.device)[0]  # type: ignore[arg-type]
        others = sum(p.numel() * p.element_size() for p in peer.parameters()) if peer.device.type == "cuda" else 0  # type: ignore[union-attr]
        theirs = TransformersBatch(peer, count, config.prompt_tokens, config.new_tokens)
        found["transformers", "single", window, count] = lambda number: theirs.run(prompts(number))
    if config.long_tokens:
        found["e2llm", "behind", config.long_tokens, 2] = lambda number: contestants.behind_a_long_one(
            engine, prompts(number, 1, config.long_tokens)[0], config.prompt_tokens
        )
    for tokens in config.prefill:
        found["e2llm", "prefill", tokens, 1] = lambda number, tokens=tokens: contestants.prefill(  # type: ignore[misc]
            engine, prompts(number, 1, tokens)[0]
        )
    for many, tokens in config.decode:
        found["e2llm", "decode", tokens, many] = lambda number, many=many, tokens=tokens: contestants.decode(  # type: ignore[misc]
            engine, prompts(number, many, tokens)
        )
    return found


RATIOS = (
    ("ratio_to_single", ("e2llm", "mixed"), ("e2llm", "single")),
    ("ratio_to_transformers", ("e2llm", "single"), ("transformers", "single")),
)
UNITS = {
    "output_tokens_per_second": "tokens/s",
    "prefill_tokens_per_second": "tokens/s",
    "floor_prefill_tokens_per_second": "tokens/s",
    "time_to_first_token_seconds": "s",
    "peak_memory_bytes": "bytes",
    "read_bytes_per_second": "bytes/s",
    "copy_bytes_per_second": "bytes/s",
    "cpu_seconds": "s",
    "ratio_to_single": "ratio",
    "cpu_ratio_to_single": "ratio",
    "cpu_ratio_to_transformers": "ratio",
    "ratio_to_transformers": "ratio",
    "ratio_to_floor": "ratio",
    "ratio_to_bandwidth": "ratio",
}


def _record(
    config: ServeConfig, engine: BatchEngine, rounds: dict[Contestant, list[Round]], failed: dict[Contestant, str]
) -> Record:
    """Rows: medians. Examples: every round's figure."""
    measured: list[tuple[dict[str, Any], str, list[float]]] = []
    base = {"base_model": config.base_model or str(config.model).rstrip("/").rsplit("/", 1)[-1]}
    for name, found in rounds.items():
        labels = base | dict(zip(("engine", "mix", "window", "requests"), name, strict=True))
        measured += [(labels, metric, [r[metric] for r in found]) for metric in (found[0] if found else {})]
    by_mix = {name[:2]: (name, found) for name, found in rounds.items() if found}
    for metric, one, other in RATIOS:
        if one not in by_mix or other not in by_mix:
            continue
        name, mine = by_mix[one]
        labels = base | dict(zip(("engine", "mix", "window", "requests"), name, strict=True))
        pairs = list(zip(mine, by_mix[other][1], strict=False))
        key = "output_tokens_per_second"
        measured.append((labels, metric, [a[key] / b[key] for a, b in pairs]))
        if "cpu_seconds" in mine[0]:  # the same work: more is better here too
            measured.append((labels, f"cpu_{metric}", [b["cpu_seconds"] / a["cpu_seconds"] for a, b in pairs]))
    facts = {
        "device": engine.model.device.type,
        "dtype": str(engine.model.dtype).removeprefix("torch."),
        "method": engine.extension.method,
        "attention_path": engine.stats().attention,
        "failed": {" ".join(map(str, name)): why for name, why in failed.items()},
    }
    return Record(
        kind="serve",
        config=portable({**asdict(config), **facts, "scales": list(config.scales)}),
        rows=[make_row(m, statistics.median(v), UNITS[m], len(v), **labels) for labels, m, v in measured],
        examples=[
            {**labels, "metric": m, "round": number, "value": value}
            for labels, m, v in measured
            for number, value in enumerate(v)
        ],
    )
