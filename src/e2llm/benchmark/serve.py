"""`e2llm benchmark serve`: what a scale per request costs, and how the engine stands beside transformers' own.

Flows in: a checkpoint and sizes. Flows out: a Record. Contestants take turns, round after round, on the same prompts
(random tokens, no end of text); figures are medians over rounds, ratios are medians of each round's ratio, so that a
machine's slow minute falls out. The first round warms up and is not counted.
"""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from e2llm.engine import BatchEngine, Request, Sampling
from e2llm.hf import load_model
from e2llm.records import Record, make_row, portable

Round = dict[str, float]
"""Metric -> value, of one contestant in one round."""


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
    rounds: int = 5
    transformers: bool = True
    """Also run transformers' continuous batching on the same requests."""
    seed: int = 0
    dtype: str | None = None
    device: str | None = None
    base_model: str = ""

    def __post_init__(self) -> None:
        for name in ("requests", "prompt_tokens", "new_tokens", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: use at least 1")
        if not self.scales or any(scale < 1 for scale in self.scales):
            raise ValueError(f"scales = {list(self.scales)}: give numbers of at least 1")


def benchmark_serve(config: ServeConfig, *, progress: Callable[[str], None] = lambda line: None) -> Record:
    """Run all contestants. Raises ValueError for sizes that the engine refuses."""
    engine = BatchEngine.load(config.model, dtype=config.dtype, device=config.device, prefix_cache=False)
    try:
        contestants = _contestants(engine, config)
        rounds: dict[str, list[Round]] = {name: [] for name in contestants}
        for number in range(config.rounds + 1):
            for name, run in contestants.items():
                found = run(number)
                if number:
                    rounds[name].append(found)
            progress(f"round {number} of {config.rounds}" + (" (warm-up)" if not number else ""))
        return _record(config, engine, rounds)
    finally:
        engine.close()


def _contestants(engine: BatchEngine, config: ServeConfig) -> dict[str, Callable[[int], Round]]:
    single = [config.scales[0]] * config.requests
    mixed = [config.scales[i % len(config.scales)] for i in range(config.requests)]
    found = {
        "e2llm single": lambda number: _batch(engine, config, number, single),
        "e2llm mixed": lambda number: _batch(engine, config, number, mixed),
    }
    if config.transformers:
        # Weights of its own: the engine's model attends over the engine's pages.
        peer = load_model(config.model, dtype=config.dtype, device=config.device)[0]  # type: ignore[arg-type]
        found["transformers single"] = lambda number: _transformers_batch(peer, config, number)
    if config.long_tokens:
        found["e2llm behind"] = lambda number: _behind_a_long_one(engine, config, number)
    return found


def _prompts(config: ServeConfig, number: int, vocabulary: int) -> list[tuple[int, ...]]:
    random = np.random.default_rng([config.seed, number])
    rows = random.integers(0, vocabulary, size=(config.requests, config.prompt_tokens))
    return [tuple(row) for row in rows.tolist()]


def _batch(engine: BatchEngine, config: ServeConfig, number: int, scales: Sequence[float]) -> Round:
    """All requests at once: tokens a second from the first submit to the last token, and the median first token."""
    prompts = _prompts(config, number, engine.model.config.get_text_config().vocab_size)
    firsts: list[float] = []
    start = time.perf_counter()

    def read(stream: Any) -> None:
        first = None
        for output in stream:
            if output.token_ids and first is None:
                first = time.perf_counter() - start
            if output.finish_reason == "error":
                raise RuntimeError(output.error)
        assert first is not None
        firsts.append(first)

    streams = [
        engine.submit(_request(prompt, config.new_tokens, scale)) for prompt, scale in zip(prompts, scales, strict=True)
    ]
    readers = [threading.Thread(target=read, args=(stream,)) for stream in streams]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    seconds = time.perf_counter() - start
    if len(firsts) < len(streams):
        raise RuntimeError(f"{len(streams) - len(firsts)} of {len(streams)} requests ended with an error")
    return {
        "output_tokens_per_second": config.requests * config.new_tokens / seconds,
        "prefill_tokens_per_second": config.requests * config.prompt_tokens / max(firsts),
        "time_to_first_token_seconds": statistics.median(firsts),
    }


def _request(prompt: tuple[int, ...], new_tokens: int, scale: float | None) -> Request:
    sampling = Sampling(ignore_eos=True)
    return Request(prompt_ids=prompt, max_new_tokens=new_tokens, scale=scale, sampling=sampling, beyond_trained=True)


def _transformers_batch(model: Any, config: ServeConfig, number: int) -> Round:
    """The same requests through transformers' continuous batching, at scale 1."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    prompts = _prompts(config, number, model.config.get_text_config().vocab_size)
    # No token ends a text: -1 is none.
    generation = GenerationConfig(max_new_tokens=config.new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    # Memory for these requests and no more (pages of 256 tokens): by default it takes all there is, which on a CPU is
    # many seconds of clearing.
    pages = 2 * config.requests * math.ceil((config.prompt_tokens + config.new_tokens) / 256)
    batching = ContinuousBatchingConfig(num_blocks=pages + 8)
    start = time.perf_counter()
    found = model.generate_batch(
        [list(prompt) for prompt in prompts], generation_config=generation, continuous_batching_config=batching
    )
    seconds = time.perf_counter() - start
    made = sum(len(output.generated_tokens) for output in found.values())
    if made != config.requests * config.new_tokens:
        raise RuntimeError(f"transformers made {made} tokens of {config.requests * config.new_tokens}")
    return {"output_tokens_per_second": made / seconds}


def _behind_a_long_one(engine: BatchEngine, config: ServeConfig, number: int) -> Round:
    """First token of a short request that arrives while a long prompt is being read, and the long prompt's own."""
    random = np.random.default_rng([config.seed, number, 1])
    vocabulary = engine.model.config.get_text_config().vocab_size
    long_prompt = tuple(random.integers(0, vocabulary, size=config.long_tokens).tolist())
    start = time.perf_counter()
    long_stream = engine.submit(_request(long_prompt, 2, None))
    short_start = time.perf_counter()
    short = engine.submit(_request(long_prompt[: config.prompt_tokens], 2, None))
    short_first = _first_token(short) - short_start
    long_first = _first_token(long_stream) - start
    return {
        "time_to_first_token_seconds": short_first,
        "prefill_tokens_per_second": config.long_tokens / long_first,
    }


def _first_token(stream: Any) -> float:
    found = None
    for output in stream:
        if output.token_ids and found is None:
            found = time.perf_counter()
        if output.finish_reason == "error":
            raise RuntimeError(output.error)
    assert found is not None
    return found


UNITS = {
    "output_tokens_per_second": "tokens/s",
    "prefill_tokens_per_second": "tokens/s",
    "time_to_first_token_seconds": "s",
    "ratio_to_single": "ratio",
    "ratio_to_transformers": "ratio",
}


def _record(config: ServeConfig, engine: BatchEngine, rounds: dict[str, list[Round]]) -> Record:
    """Rows: medians. Examples: every round's figure."""
    measured: list[tuple[dict[str, Any], str, list[float]]] = []
    base = {"base_model": config.base_model or str(config.model).rstrip("/").rsplit("/", 1)[-1]}
    window = config.prompt_tokens + config.new_tokens
    for name, found in rounds.items():
        who, mix = name.split()
        labels = {"engine": who, "mix": mix, "window": config.long_tokens if mix == "behind" else window}
        measured += [(base | labels, metric, [r[metric] for r in found]) for metric in found[0]]
    for metric, one, other in (
        ("ratio_to_single", "e2llm mixed", "e2llm single"),
        ("ratio_to_transformers", "e2llm single", "transformers single"),
    ):
        if one in rounds and other in rounds:
            key = "output_tokens_per_second"
            ratios = [a[key] / b[key] for a, b in zip(rounds[one], rounds[other], strict=True)]
            measured.append((base | {"engine": "e2llm", "mix": one.split()[1], "window": window}, metric, ratios))
    facts = {
        "device": engine.model.device.type,
        "dtype": str(engine.model.dtype).removeprefix("torch."),
        "method": engine.extension.method,
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
