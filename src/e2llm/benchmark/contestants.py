"""What is measured: one run each, on prompts that follow from seed and round alone.

Flows in: an engine or a model, sizes. Flows out: a `Round`, figures by metric. Prompts are random tokens and no token
ends a text, so that everybody makes the same number of tokens.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from e2llm.benchmark.floors import attention_seconds, copy_bandwidth, matmul_seconds, weight_bytes
from e2llm.engine import BatchEngine, Request, Sampling
from e2llm.engine.stream import QueueStream

Round = dict[str, float]
"""Metric -> value, of one contestant in one round."""

DECODE_TOKENS = 192
"""New tokens of each request where decoding alone is measured, and more: while the last prompts are read the first
requests write already."""
READ_A_STEP = 512
"""Prompt tokens that every engine reads in a step at least."""


def random_prompts(seed: Sequence[int], count: int, num_tokens: int, vocabulary: int) -> list[tuple[int, ...]]:
    rows = np.random.default_rng(list(seed)).integers(0, vocabulary, size=(count, num_tokens))
    return [tuple(row) for row in rows.tolist()]


def vocabulary_of(model: Any) -> int:
    return int(model.config.get_text_config().vocab_size)


def request_of(prompt: tuple[int, ...], new_tokens: int, scale: float | None) -> Request:
    sampling = Sampling(ignore_eos=True)
    return Request(prompt_ids=prompt, max_new_tokens=new_tokens, scale=scale, sampling=sampling, beyond_trained=True)


def run_together(engine: BatchEngine, requests: Sequence[Request]) -> list[list[float]]:
    """All at once: when each token of each request was made, seconds since the first submit."""
    arrivals: list[list[float]] = [[] for _ in requests]
    start = time.perf_counter()
    streams = [engine.submit(request) for request in requests]
    for times, stream in zip(arrivals, streams, strict=True):
        for output in stream:
            times += [stream.made_at - start] * len(output.token_ids)
            if output.finish_reason == "error":
                raise RuntimeError(f"a request ended with an error: {output.error}")
    return arrivals


def batch(engine: BatchEngine, prompts: Sequence[tuple[int, ...]], new_tokens: int, scales: Sequence[float]) -> Round:
    """Tokens a second from the first submit to the last token, and the median first token."""
    requests = [request_of(prompt, new_tokens, scale) for prompt, scale in zip(prompts, scales, strict=True)]
    arrivals = run_together(engine, requests)
    firsts = [times[0] for times in arrivals]
    return {
        "output_tokens_per_second": len(prompts) * new_tokens / max(times[-1] for times in arrivals),
        "prefill_tokens_per_second": sum(map(len, prompts)) / max(firsts),
        "time_to_first_token_seconds": statistics.median(firsts),
    }


class TransformersBatch:
    """transformers' continuous batching over a model of its own, at scale 1. Its manager, cache and graphs stay from
    round to round, as the engine's do; starting its thread is not counted."""

    def __init__(self, model: Any, requests: int, prompt_tokens: int, new_tokens: int) -> None:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        self.model, self.new_tokens = model, new_tokens
        # No token ends a text: -1 is none.
        generation = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
        # Memory for these requests and no more (pages of 256 tokens): by default it takes all there is, which on a CPU
        # is many seconds of clearing.
        pages = 2 * requests * math.ceil((prompt_tokens + new_tokens) / 256) + 8
        batching = ContinuousBatchingConfig(num_blocks=pages)
        self._settings = {"generation_config": generation, "continuous_batching_config": batching}

    def run(self, prompts: Sequence[tuple[int, ...]]) -> Round:
        with self.model.continuous_batching_context_manager(**self._settings, persistent_manager=True) as manager:
            start = time.perf_counter()
            manager.add_requests(inputs=[list(prompt) for prompt in prompts], max_new_tokens=self.new_tokens)
            made = finished = 0
            while finished < len(prompts):
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    if result.error:
                        raise RuntimeError(f"transformers: {result.error}")
                    finished, made = finished + 1, made + len(result.generated_tokens)
                elif result is None and not manager.is_running():
                    raise RuntimeError("transformers' continuous batching stopped")
            seconds = time.perf_counter() - start
        if made != len(prompts) * self.new_tokens:
            raise RuntimeError(f"transformers made {made} tokens of {len(prompts) * self.new_tokens}")
        return {"output_tokens_per_second": made / seconds}

    def close(self) -> None:
        self.model.destroy_cached_continuous_batching_manager()


def behind_a_long_one(engine: BatchEngine, long_prompt: tuple[int, ...], short_tokens: int) -> Round:
    """First token of a short request that arrives while a long prompt is being read, and the long prompt's own."""
    start = time.perf_counter()
    long_stream = engine.submit(request_of(long_prompt, 2, None))
    short_start = time.perf_counter()
    short = engine.submit(request_of(long_prompt[:short_tokens], 2, None))
    short_first = first_token(short) - short_start
    return {
        "time_to_first_token_seconds": short_first,
        "prefill_tokens_per_second": len(long_prompt) / (first_token(long_stream) - start),
    }


def first_token(stream: QueueStream) -> float:
    """time.perf_counter() at which a stream's first token was made; reads it to its end."""
    found = None
    for output in stream:
        if output.token_ids and found is None:
            found = stream.made_at
        if output.finish_reason == "error":
            raise RuntimeError(output.error)
    assert found is not None
    return found


def prefill(engine: BatchEngine, prompt: tuple[int, ...]) -> Round:
    """One prompt alone, and the floor of the same shapes: its matrix products and its attention, nothing else."""
    start = time.perf_counter()
    seconds = first_token(engine.submit(request_of(prompt, 1, None))) - start
    model, tokens = engine.model, len(prompt)
    floor = matmul_seconds(model, tokens, engine.chunk_tokens) + attention_seconds(model, tokens)
    return {
        "prefill_tokens_per_second": tokens / seconds,
        "floor_prefill_tokens_per_second": tokens / floor,
        "ratio_to_floor": floor / seconds,
    }


def decode_window(count: int, prompt_tokens: int) -> int:
    """Prompt and new tokens of each of `count` requests whose decoding is measured."""
    return prompt_tokens + DECODE_TOKENS + math.ceil(count * prompt_tokens / READ_A_STEP)


def decode(engine: BatchEngine, prompts: Sequence[tuple[int, ...]]) -> Round:
    """Tokens a second while all requests decode and none reads its prompt, and the bytes that this must read (weights
    once a step, every request's keys and values) as a share of the copy bandwidth of the same minute."""
    count, length = len(prompts), len(prompts[0])
    new_tokens = decode_window(count, length) - length
    arrivals = run_together(engine, [request_of(prompt, new_tokens, None) for prompt in prompts])
    begin, end = max(times[0] for times in arrivals), min(times[-1] for times in arrivals)
    counted = [sum(begin < at <= end for at in times) for times in arrivals]
    if end <= begin or min(counted) < 2:
        raise RuntimeError("the first request ended before the last one began to write")
    speed = sum(counted) / (end - begin)
    # In the middle of what was counted a request has written what came before, and half of it.
    written = sum(sum(at <= begin for at in times) for times in arrivals) / count
    keys = count * (length + written + statistics.mean(counted) / 2)
    bytes_a_step = weight_bytes(engine.model) + keys * engine.read_bytes
    bandwidth = copy_bandwidth(engine.model.device)
    return {
        "output_tokens_per_second": speed,
        "read_bytes_per_second": bytes_a_step * speed / count,
        "copy_bytes_per_second": bandwidth,
        "ratio_to_bandwidth": bytes_a_step * speed / count / bandwidth,
    }


def own_peak_bytes(model: Any, others: int) -> float | None:
    """Largest CUDA memory since the last reset, without what `others` hold; None elsewhere."""
    if model.device.type != "cuda":
        return None
    return float(torch.cuda.max_memory_allocated(model.device) - others)
