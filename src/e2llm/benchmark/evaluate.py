"""`e2llm benchmark evaluate`: how fast sliding-window perplexity is read, against what the card can do.

Flows in: a checkpoint, or a shape with random weights. Flows out: a Record. What is timed is the evaluation's own
`sliding_windows`, on random tokens. Each window is a pass of its own, so a window's FLOPs are those of reading it
whole; its matrix products and its attention are timed alone too, by the libraries that are there: the floor.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from e2llm.benchmark.contestants import vocabulary_of
from e2llm.benchmark.floors import attention_seconds, matmul_seconds
from e2llm.benchmark.shapes import DENSE_BF16_FLOPS, random_model, shape_of
from e2llm.evaluate.documents import Document
from e2llm.evaluate.logits import TokenScorer
from e2llm.evaluate.perplexity import sliding_windows
from e2llm.infer import Engine
from e2llm.intervals import Interval, interval_fields, interval_of_statistic
from e2llm.records import Record, make_row, portable

UNITS = {
    "tokens_per_second": "tokens/s",
    "seconds_per_window": "s",
    "model_flops_utilization": "share",
    "ratio_to_floor": "ratio",
    "peak_memory_bytes": "bytes",
}


@dataclass(frozen=True, kw_only=True)
class ModelChoice:
    """Which model is measured: a checkpoint, or a shape with random weights."""

    model: str = ""
    """Checkpoint folder, hub name or .gguf file; empty: `shape`."""
    shape: str = ""
    """Name of a shape (benchmark.shapes), with random weights."""
    seed: int = 0
    dtype: str | None = None
    device: str | None = None
    base_model: str = ""

    def __post_init__(self) -> None:
        if bool(self.model) == bool(self.shape):
            raise ValueError(f"model = {self.model!r}, shape = {self.shape!r}: name one of the two")
        if self.shape:
            shape_of(self.shape)

    @property
    def label(self) -> str:
        """What rows call the model."""
        return self.base_model or self.shape or self.model.rstrip("/").rsplit("/", 1)[-1]


@dataclass(frozen=True, kw_only=True)
class EvaluateSpeedConfig(ModelChoice):
    """Sizes of the measurement."""

    windows: tuple[int, ...] = (32_768,)
    """Tokens of a window."""
    stride: int = 256
    """Tokens that a window scores."""
    steps: int = 4
    """Windows read in a round."""
    rounds: int = 5
    """Rounds after the one that warms up."""
    compile: tuple[str, ...] = ("none", "layers")
    """Ways of reading, which take turns."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("stride", "steps", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: use at least 1")
        if not self.windows or min(self.windows) <= self.stride:
            raise ValueError(f"windows = {list(self.windows)}: give lengths above the stride ({self.stride})")
        strange = set(self.compile) - {"none", "layers"}
        if strange or not self.compile:
            raise ValueError(f"compile = {list(self.compile)}: use none, layers or both")


def window_flops(model: Any, window: int, scored: int) -> float:
    """FLOPs of reading a window and of the logits of `scored` tokens, forward only.

    2 a weight of a linear layer and token, 2 · layers · width · window² for causal attention (half of the pairs, two
    products, 2 FLOPs each); embeddings are looked up and cost none. Width: heads × head size.
    """
    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head)
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = config.num_attention_heads * dim
    attention = 2.0 * config.num_hidden_layers * width * window**2
    return 2.0 * weights * window + attention + 2.0 * head.weight.numel() * scored


def benchmark_evaluate(
    config: EvaluateSpeedConfig,
    *,
    progress: Callable[[str], None] = lambda line: None,
    save: Callable[[Record], Any] = lambda record: None,
) -> Record:
    """Measure every window, both ways in turn; `save` gets what there is after every window.

    Raises ValueError for a model whose floor is not known (sliding-window layers).
    """
    engine = open_engine(config)
    rounds: dict[tuple[int, str], list[dict[str, float]]] = {}
    record = _record(config, engine, rounds)
    for window in config.windows:
        floor = _floor_seconds(engine.model, window, config.stride)
        scorers = {way: TokenScorer(engine, compiled=way == "layers") for way in config.compile}
        for number in range(config.rounds + 1):
            for way, scorer in scorers.items():
                found = _round(engine, config, window, scorer, number)
                if number:
                    found["ratio_to_floor"] = floor / found["seconds_per_window"]
                    rounds.setdefault((window, way), []).append(found)
                    progress(f"  {window} {way}: " + ", ".join(f"{k} {v:.4g}" for k, v in found.items()))
            progress(f"{window}: round {number} of {config.rounds}" + ("" if number else " (warm-up)"))
        record = _record(config, engine, rounds)
        save(record)
    return record


def open_engine(config: ModelChoice) -> Engine:
    """The checkpoint, or the shape with random weights: without a tokenizer."""
    if config.model:
        return Engine.load(config.model, dtype=config.dtype, device=config.device)
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = config.dtype or ("bfloat16" if device.startswith("cuda") else "float32")
    return Engine(random_model(shape_of(config.shape), dtype=dtype, device=device, seed=config.seed), None)


def _floor_seconds(model: Any, window: int, scored: int) -> float:
    """Seconds of a window's matrix products and attention alone, without logits."""
    with torch.no_grad():
        return matmul_seconds(model, window, window) + attention_seconds(model, window)


def _round(
    engine: Engine, config: EvaluateSpeedConfig, window: int, scorer: TokenScorer, number: int
) -> dict[str, float]:
    """One document that takes `steps` windows."""
    device = engine.model.device
    length = window + (config.steps - 1) * config.stride
    draw = np.random.default_rng([config.seed, window, number])
    tokens = draw.integers(0, vocabulary_of(engine.model), length, dtype=np.int32)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    losses = sliding_windows(
        engine,
        [Document(f"random {number}", tokens)],
        window=window,
        scale=max(1.0, window / engine.native_window),
        windows=[window, length],
        stride=config.stride,
        max_strides=config.steps,
        scorer=scorer,
    )  # it reads the sums back, so the device is done
    seconds = (time.perf_counter() - begin) / losses[0].passes
    found = {"tokens_per_second": window / seconds, "seconds_per_window": seconds}
    if device.type == "cuda":
        flops = window_flops(engine.model, window, config.stride)
        found["model_flops_utilization"] = flops / seconds / DENSE_BF16_FLOPS
        found["peak_memory_bytes"] = float(torch.cuda.max_memory_allocated(device))
    return found


def _interval_of_median(values: list[float]) -> Interval | None:
    return interval_of_statistic(len(values), lambda drawn: statistics.median(values[i] for i in drawn))


def _record(
    config: EvaluateSpeedConfig, engine: Engine, rounds: dict[tuple[int, str], list[dict[str, float]]]
) -> Record:
    """Rows: medians, with the bootstrap's interval over rounds. Examples: every round's figures."""
    rows, examples = [], []
    for (window, way), found in rounds.items():
        labels = {"base_model": config.label, "protocol": "sliding", "window": window}
        labels |= {"compile": way, "stride": config.stride}
        for metric in found[0]:
            values = [one[metric] for one in found]
            spread = interval_fields(_interval_of_median(values))
            rows.append(make_row(metric, statistics.median(values), UNITS[metric], len(values), **labels, **spread))
            examples += [{**labels, "metric": metric, "round": n, "value": value} for n, value in enumerate(values)]
    facts = {
        "device": engine.model.device.type,
        "dtype": str(engine.model.dtype).removeprefix("torch."),
        "method": engine.extension.method,
        "attn_implementation": getattr(engine.model.config, "_attn_implementation", None),
        "peak_flops": DENSE_BF16_FLOPS,
    }
    return Record(kind="evaluate_speed", config=portable({**asdict(config), **facts}), rows=rows, examples=examples)
