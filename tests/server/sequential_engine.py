"""A real, plain engine for the tests: one request after another over `infer.Engine`, in a thread of its own.

Its answers are the independent reference for what the server sends: it knows nothing of HTTP or batching.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any

import torch

from e2llm.engine.request import Admission, EngineStats, Output, RefusedError, Request, TokenLogprob
from e2llm.infer import Engine, end_tokens, sample_token


class SequentialStream:
    """A request's outputs, and the wish to stop."""

    def __init__(self, request: Request, admission: Admission) -> None:
        self.request, self.admission = request, admission
        self.cancelled = threading.Event()
        self.outputs: queue.SimpleQueue[Output] = queue.SimpleQueue()

    def __iter__(self) -> Iterator[Output]:
        while True:
            output = self.outputs.get()
            yield output
            if output.finish_reason is not None:
                return

    def cancel(self) -> None:
        self.cancelled.set()


class SequentialEngine:
    """`ServingEngine` over one model. `before_step` runs before every token: tests hold the engine up with it."""

    name = "e2llm"

    def __init__(self, engine: Engine, kv_tokens: int = 100_000) -> None:
        self.engine, self.tokenizer = engine, engine.tokenizer
        self.native_window, self.max_scale = engine.native_window, engine.max_scale
        self.schedule = engine.extension.schedule
        self.kv_tokens = kv_tokens
        self.before_step: Any = lambda: None
        self._queue: queue.SimpleQueue[SequentialStream | None] = queue.SimpleQueue()
        self._open: set[SequentialStream] = set()
        self._running: SequentialStream | None = None
        self._counts = {"prompt": 0, "output": 0}
        self._closed = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> SequentialStream:
        if self._closed:
            raise RuntimeError("the engine is closed")
        count = len(request.prompt_ids)
        plan = self.engine.plan(count, max_new_tokens=request.max_new_tokens, scale=request.scale)
        total = count + plan.max_new_tokens
        largest = int(self.native_window * self.max_scale)
        if not request.beyond_trained and total > largest:
            raise RefusedError(f"prompt {count} + new {plan.max_new_tokens} at scale {plan.scale:g}: largest {largest}")
        if total > self.kv_tokens:
            raise RefusedError(f"prompt + new tokens = {total}: the KV memory holds {self.kv_tokens}")
        stream = SequentialStream(
            request, Admission(plan.scale, plan.window, count, plan.max_new_tokens, plan.warnings)
        )
        with self._lock:
            self._open.add(stream)
        self._queue.put(stream)
        return stream

    def stats(self) -> EngineStats:
        with self._lock:
            running = self._running
            used = running.admission.prompt_tokens + running.admission.max_new_tokens if running else 0
            return EngineStats(
                running=int(running is not None),
                waiting=sum(not s.cancelled.is_set() for s in self._open - {running}),
                kv_tokens_used=used,
                kv_tokens_total=self.kv_tokens,
                prompt_tokens_total=self._counts["prompt"],
                cached_tokens_total=0,
                output_tokens_total=self._counts["output"],
            )

    def close(self, *, drain: bool = False) -> None:
        self._closed = True
        if not drain:
            with self._lock:
                for stream in self._open:
                    stream.cancel()
        self._queue.put(None)
        self._thread.join(60)

    def _work(self) -> None:
        while (stream := self._queue.get()) is not None:
            with self._lock:
                self._running = stream
            try:
                last = self._run(stream)
            except Exception as error:
                last = Output(finish_reason="error", error=str(error))
            with self._lock:
                self._running = None
                self._open.discard(stream)
            stream.outputs.put(last)

    def _run(self, stream: SequentialStream) -> Output:
        request, engine = stream.request, self.engine
        sampling = request.sampling
        generator = None if sampling.seed is None else torch.Generator().manual_seed(sampling.seed)
        ends = set() if sampling.ignore_eos else end_tokens(engine.model, engine.tokenizer)
        with engine.at_scale(stream.admission.scale):
            if stream.cancelled.is_set():
                return Output(finish_reason="cancelled")
            logits, cache = engine.prefill(request.prompt_ids)
            self._counts["prompt"] += len(request.prompt_ids)
            tokens: list[int] = []
            sent = ""
            while True:
                self.before_step()
                if stream.cancelled.is_set():
                    return Output(finish_reason="cancelled")
                token = int(
                    sample_token(logits, temperature=sampling.temperature, top_p=sampling.top_p, generator=generator)
                )
                tokens.append(token)
                self._counts["output"] += 1
                logprobs = self._logprobs(logits, token, sampling.logprobs)
                text = engine._text(tokens)
                found = [place for stop in sampling.stop if (place := text.find(stop)) >= 0]
                finish = (
                    "stop"
                    if found or token in ends
                    else "length"
                    if len(tokens) == stream.admission.max_new_tokens
                    else None
                )
                if found:
                    text = text[: min(found)]
                shown = text if finish else text[: len(text) - _held_back(text, sampling.stop)]
                output = Output(shown[len(sent) :], (token,), logprobs, finish)
                sent = shown
                if finish is not None:
                    return output
                stream.outputs.put(output)
                logits, cache = engine.step(token, cache)

    def _logprobs(self, logits: torch.Tensor, token: int, count: int | None) -> tuple[TokenLogprob, ...]:
        if count is None:
            return ()
        values = torch.log_softmax(logits.float(), -1)
        top = values.topk(count)
        pairs = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        return (TokenLogprob(token, float(values[token]), pairs),)


def _held_back(text: str, stops: tuple[str, ...]) -> int:
    """Characters at the end that are half a character, or may begin a stop string."""
    if text.endswith("\ufffd"):
        return len(text) - len(text.rstrip("\ufffd"))
    sizes = [size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size])]
    return max(sizes, default=0)
