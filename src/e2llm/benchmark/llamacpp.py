"""The llamacpp engine beside the project's own on one machine: `python -m e2llm.benchmark.llamacpp CHECKPOINT`.

Flows in: a checkpoint and sizes. Flows out: a Record with rows labelled engine=e2llm and engine=llamacpp. Both engines
answer the same prompts (random tokens, no end of text) in turn, round after round, with the same number of threads;
figures are medians over rounds, ratios medians of each round's ratio. The first round warms up and is not counted.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from e2llm.engine import BatchEngine, Request, Sampling, ServingEngine
from e2llm.llamacpp.engine import LlamaCppEngine, usable_cores
from e2llm.records import Record, make_row, portable

Round = dict[str, float]
UNITS = {
    "output_tokens_per_second": "tokens/s",
    "prefill_tokens_per_second": "tokens/s",
    "time_to_first_token_seconds": "s",
    "ratio_to_e2llm": "ratio",
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes of the measurement."""

    model: str
    prompt_tokens: int = 512
    new_tokens: int = 64
    requests: int = 6
    """Of the mixed batch, in flight at once."""
    scales: tuple[float, ...] = (1.0, 2.0, 4.0)
    """Of the mixed batch, request after request."""
    rounds: int = 3
    dtype: str = "bfloat16"
    """Of the weights, in both engines."""
    threads: int | None = None
    """None: all cores that this process may use."""
    base_model: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "requests", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: use at least 1")
        if self.new_tokens < 2:
            raise ValueError(f"new_tokens = {self.new_tokens}: decoding is timed between tokens; use at least 2")
        if not self.scales or any(scale < 1 for scale in self.scales):
            raise ValueError(f"scales = {list(self.scales)}: give numbers of at least 1")


def measure(config: Config, *, progress: Callable[[str], None] = lambda line: None) -> Record:
    """Run both engines. Raises ValueError for what either refuses."""
    threads = config.threads or usable_cores()
    torch.set_num_threads(threads)
    cells = 4 * config.requests * (config.prompt_tokens + config.new_tokens) + 8192
    llamacpp = LlamaCppEngine.load(
        config.model, dtype=config.dtype, kv_tokens=cells // 256 * 256, threads=threads, tell=progress
    )
    own = BatchEngine.load(config.model, dtype=config.dtype, device="cpu", prefix_cache=False)
    engines: dict[str, ServingEngine] = {"e2llm": own, "llamacpp": llamacpp}
    vocabulary = int(own.model.config.get_text_config().vocab_size)
    rounds: dict[tuple[str, str], list[Round]] = {(e, mix): [] for mix in ("single", "mixed") for e in engines}
    try:
        for number in range(config.rounds + 1):
            prompts = _prompts(config, number, vocabulary)
            for mix, engine in ((mix, engine) for mix in ("single", "mixed") for engine in engines):
                scales = (1.0,) if mix == "single" else config.scales
                chosen = prompts[:1] if mix == "single" else prompts
                found = _run(engines[engine], chosen, config.new_tokens, scales)
                if number:
                    rounds[engine, mix].append(found)
            progress(f"round {number} of {config.rounds}" + (" (warm-up)" if not number else ""))
    finally:
        llamacpp.close()
        own.close()
    facts = {"threads": threads, "method": own.extension.method, "gguf": llamacpp.file.path.name, "device": "cpu"}
    return _record(config, rounds, facts)


def _prompts(config: Config, number: int, vocabulary: int) -> list[tuple[int, ...]]:
    random = np.random.default_rng([config.seed, number])
    rows = random.integers(0, vocabulary, size=(config.requests, config.prompt_tokens))
    return [tuple(row) for row in rows.tolist()]


def _run(engine: ServingEngine, prompts: Sequence[tuple[int, ...]], new_tokens: int, scales: Sequence[float]) -> Round:
    """All prompts at once. Decoding is counted from the moment that every request has its first token."""
    arrivals: list[list[float]] = [[] for _ in prompts]
    errors: list[str] = []
    start = time.perf_counter()

    def read(place: int, stream: Any) -> None:
        for output in stream:
            arrivals[place] += [time.perf_counter() - start] * len(output.token_ids)
            if output.finish_reason == "error":
                errors.append(str(output.error))

    sampling = Sampling(ignore_eos=True)
    streams = [
        engine.submit(
            Request(
                prompt_ids=prompt,
                max_new_tokens=new_tokens,
                scale=scales[place % len(scales)],
                sampling=sampling,
                beyond_trained=True,
            )
        )
        for place, prompt in enumerate(prompts)
    ]
    readers = [threading.Thread(target=read, args=pair) for pair in enumerate(streams)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    if errors:
        raise RuntimeError(f"{len(errors)} of {len(prompts)} requests ended with an error: {errors[0]}")
    firsts, last = [times[0] for times in arrivals], max(times[-1] for times in arrivals)
    after = sum(1 for times in arrivals for moment in times if moment > max(firsts))
    return {
        "output_tokens_per_second": after / (last - max(firsts)),
        "prefill_tokens_per_second": sum(map(len, prompts)) / max(firsts),
        "time_to_first_token_seconds": statistics.median(firsts),
    }


def _record(config: Config, rounds: dict[tuple[str, str], list[Round]], facts: dict[str, Any]) -> Record:
    """Rows: medians. Examples: every round's figure."""
    name = config.base_model or str(config.model).rstrip("/").rsplit("/", 1)[-1]
    window = config.prompt_tokens + config.new_tokens
    measured: list[tuple[dict[str, Any], str, list[float]]] = []
    for (engine, mix), found in rounds.items():
        labels = {"base_model": name, "engine": engine, "mix": mix, "window": window}
        measured += [(labels, metric, [r[metric] for r in found]) for metric in found[0]]
        if engine == "llamacpp":
            key = "output_tokens_per_second"
            ratios = [a[key] / b[key] for a, b in zip(found, rounds["e2llm", mix], strict=True)]
            measured.append((labels, "ratio_to_e2llm", ratios))
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


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. 0, or 2 for what the user can mend."""
    parser = argparse.ArgumentParser(prog="python -m e2llm.benchmark.llamacpp", description=__doc__)
    add = parser.add_argument
    add("model", help="checkpoint folder")
    for name in ("prompt_tokens", "new_tokens", "requests", "rounds"):
        default = getattr(Config, name)
        add(f"--{name.replace('_', '-')}", type=int, default=default, help=f"({default})")
    add("--scales", type=float, nargs="+", default=Config.scales, metavar="G", help="of the mixed batch (1 2 4)")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default=Config.dtype, help="(bfloat16)")
    add("--threads", type=int, help="(all cores)")
    add("--base-model", default="", help="label of the model in tables")
    add("--out", default="serve_llamacpp.json", help="Record to write (serve_llamacpp.json)")
    arguments = vars(parser.parse_args(argv))
    out = arguments.pop("out")
    try:
        config = Config(**arguments | {"scales": tuple(arguments["scales"])})
        record = measure(config, progress=lambda line: print(line, file=sys.stderr, flush=True))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    record.save(out)
    for row in record.rows:
        print(f"{row['engine']:9} {row['mix']:7} {row['metric']:28} {row['value']:10.4g} {row['unit']}")
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
