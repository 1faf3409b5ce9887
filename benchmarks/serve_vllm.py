"""What e2llm's plugin costs inside vLLM: its throughput beside stock vLLM's at one fixed scale.

Flows in: a checkpoint folder with e2llm.json. Flows out: a Record. Two processes of vLLM stand by, one without the
plugin (the scale in `hf_overrides`) and one with it; they take turns on the same requests (random tokens, no end of
text), round after round, in an order that turns each time. Ratios are medians of each round's ratio, so that a
machine's slow minute falls out; the ratio of processor time is there because other work on the machine moves it less.
Both processes are started anew, in the other order, half way: what the second one finds (memory, caches) is not what
the first one did. The first round of a start warms up and is not counted. Needs vLLM:

    python benchmarks/serve_vllm.py CHECKPOINT --out benchmarks/results/serve_vllm.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from e2llm.hf.checkpoint import CheckpointInfo
from e2llm.positions.attention import attention_scale
from e2llm.records import Record, make_row, portable

CONTESTANTS = (("vllm", "single"), ("vllm-plugin", "single"), ("vllm-plugin", "mixed"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("checkpoint", help="folder with config.json and e2llm.json, method linear or yarn")
    add("--scale", type=float, default=4.0, help="of stock vLLM, and of the plugin's single batch (4)")
    add("--scales", type=float, nargs="+", default=[1.0, 2.0, 4.0, 8.0], help="of the mixed batch (1 2 4 8)")
    add("--requests", type=int, default=9, help="in one batch (9)")
    add("--prompt-tokens", type=int, default=64)
    add("--new-tokens", type=int, default=32)
    add("--starts", type=int, default=2, help="of both processes, in turning order (2)")
    add("--rounds", type=int, default=15, help="of each start, after a warm-up (15)")
    add("--dtype", default="float32", choices=["float32", "bfloat16"])
    add("--eager", action="store_true", help="no torch.compile")
    add("--base-model", default="", help="label of the model in tables")
    add("--out", default="serve_vllm.json")
    add("--worker", choices=["vllm", "vllm-plugin"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return work(arguments)
    rounds = [found for start in range(arguments.starts) for found in measure(arguments, start)]
    record = to_record(arguments, rounds)
    record.save(arguments.out)
    for row in record.rows:
        print(f"{row['engine']:12} {row['mix']:7} {row['metric']:26} {row['value']:10.4g} {row['unit']}")
    return 0


def fixed_scale(checkpoint: str, scale: float) -> dict[str, Any]:
    """hf_overrides with which stock vLLM serves the checkpoint at one scale."""
    info = CheckpointInfo.load(checkpoint)
    if info is None or info.method not in {"linear", "yarn"}:
        raise ValueError(f"checkpoint = {checkpoint!r}: give a folder whose e2llm.json has method linear or yarn")
    config = json.loads((Path(checkpoint) / "config.json").read_text())
    rope = {**config["rope_parameters"], "rope_type": info.method, "factor": scale}
    longest = info.native_window
    if info.method == "yarn":
        longest = int(scale * info.native_window)
        rope["original_max_position_embeddings"] = info.native_window
        slope = info.attention_config().serving()
        if slope is not None:
            rope["attention_factor"] = attention_scale(scale, slope)
    return {"rope_parameters": rope, "max_position_embeddings": longest}


# ---- a process of vLLM's


def work(arguments: argparse.Namespace) -> int:
    """Start vLLM, say so, then run one batch for each line on standard input and answer with its seconds
    and those of the processor."""
    from vllm import LLM, SamplingParams

    stock = arguments.worker == "vllm"
    llm = LLM(
        model=arguments.checkpoint,
        dtype=arguments.dtype,
        enforce_eager=arguments.eager,
        max_num_seqs=arguments.requests,
        max_model_len=2048,
        max_num_batched_tokens=2048,
        kv_cache_memory_bytes=2**30,
        hf_overrides=fixed_scale(arguments.checkpoint, arguments.scale) if stock else {},
    )
    marked = hasattr(llm.llm_engine.vllm_config.model_config.hf_config, "e2llm_scaling")
    assert marked is not stock, "the plugin is where it should not be, or is not where it should"
    vocabulary = llm.llm_engine.vllm_config.model_config.get_vocab_size()
    print("READY", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        random = np.random.default_rng(job["seed"])
        rows = random.integers(0, vocabulary, size=(arguments.requests, arguments.prompt_tokens)).tolist()
        params = [
            SamplingParams(
                temperature=0,
                max_tokens=arguments.new_tokens,
                ignore_eos=True,
                detokenize=False,
                extra_args=None if stock else {"e2llm_scale": job["scales"][i % len(job["scales"])]},
            )
            for i in range(arguments.requests)
        ]
        start, busy = time.perf_counter(), time.process_time()
        found = llm.generate([{"prompt_token_ids": row} for row in rows], params, use_tqdm=False)
        seconds, busy = time.perf_counter() - start, time.process_time() - busy
        made = sum(len(one.outputs[0].token_ids) for one in found)
        assert made == arguments.requests * arguments.new_tokens, made
        print("ROUND", seconds, busy, flush=True)
    return 0


# ---- the one that lets them take turns


class Worker:
    """One process of vLLM's."""

    def __init__(self, name: str) -> None:
        plugins = {"VLLM_PLUGINS": "" if name == "vllm" else "e2llm"}
        self.process = subprocess.Popen(
            [sys.executable, *sys.argv, "--worker", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **plugins, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING"},
        )
        self.answer("READY")

    def answer(self, word: str) -> list[str]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(word):
                return line.split()[1:]
        raise RuntimeError(f"vLLM ended with {self.process.wait()} before it said {word}")

    def run(self, seed: list[int], scales: list[float]) -> tuple[float, float]:
        """Seconds of one batch, and of the processor on it."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"seed": seed, "scales": scales}) + "\n")
        self.process.stdin.flush()
        seconds, busy = self.answer("ROUND")
        return float(seconds), float(busy)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


Round = dict[tuple[str, str], tuple[float, float]]
"""Of each contestant: seconds, processor seconds."""


def measure(arguments: argparse.Namespace, start: int) -> list[Round]:
    """Round after round, by two processes started in the one order or the other. The mixed batch has prompts of its
    own: those of the single one would be found in the prefix cache."""
    names = ("vllm", "vllm-plugin") if not start % 2 else ("vllm-plugin", "vllm")
    workers = {name: Worker(name) for name in names}
    scales = {"single": [arguments.scale], "mixed": arguments.scales}
    rounds = []
    try:
        for number in range(arguments.rounds + 1):
            found: Round = {}
            turn = number % len(CONTESTANTS)
            for who in CONTESTANTS[turn:] + CONTESTANTS[:turn]:
                found[who] = workers[who[0]].run([start, number, who[1] == "mixed"], scales[who[1]])
            print(f"round {number} of {arguments.rounds}: {found}", file=sys.stderr)
            if number:
                rounds.append(found)
    finally:
        for worker in workers.values():
            worker.close()
    return rounds


def to_record(arguments: argparse.Namespace, rounds: list[Round]) -> Record:
    """Rows: medians over rounds. Examples: every round."""
    import vllm

    info = CheckpointInfo.load(arguments.checkpoint)
    assert info is not None
    base = {"base_model": arguments.base_model or Path(arguments.checkpoint).name, "method": info.method}
    base["window"] = arguments.prompt_tokens + arguments.new_tokens
    stock, tokens = CONTESTANTS[0], arguments.requests * arguments.new_tokens
    measured = [
        (who, "output_tokens_per_second", "tokens/s", [tokens / one[who][0] for one in rounds]) for who in CONTESTANTS
    ]
    for place, metric in enumerate(("ratio_to_vllm", "processor_ratio_to_vllm")):
        measured += [
            (who, metric, "ratio", [one[stock][place] / one[who][place] for one in rounds]) for who in CONTESTANTS[1:]
        ]
    config = {name: value for name, value in vars(arguments).items() if name not in {"worker", "out"}}
    return Record(
        kind="serve",
        config=portable(
            {**config, "vllm": vllm.__version__, "device": "cpu", "threads": os.environ.get("OMP_NUM_THREADS")}
        ),
        rows=[
            make_row(metric, statistics.median(values), unit, len(values), engine=who[0], mix=who[1], **base)
            for who, metric, unit, values in measured
        ],
        examples=[
            {**base, "engine": who[0], "mix": who[1], "metric": metric, "round": number, "value": value}
            for who, metric, _, values in measured
            for number, value in enumerate(values)
        ],
    )


if __name__ == "__main__":
    sys.exit(main())
