"""Continuous batching over one transformers model: requests join and leave between steps, each at its own scale.

Flows in: `Request`s from any thread. Flows out: streams of `Output`s. One worker thread runs the steps: each packs the
next token of every request that decodes and pieces of prompts into one row, over paged keys. On a GPU the next step is
queued before the last one's tokens are read, so that the device never waits for Python. Scale and memory are fixed
when a request is admitted. Knows no HTTP and no file format.
"""

from __future__ import annotations

import atexit
import inspect
import logging
import threading
from collections import deque
from typing import Any

import torch

from e2llm.engine.admission import admit
from e2llm.engine.forward import Attention, Flight, Forward, Step, choose_attention
from e2llm.engine.memory import kv_pages
from e2llm.engine.pages import Pages
from e2llm.engine.planning import plan_trained
from e2llm.engine.request import Admission, EngineStats, FinishReason, Output, RefusedError, Request
from e2llm.engine.running import Running, pages_needed
from e2llm.engine.schedule import next_step
from e2llm.engine.stream import QueueStream
from e2llm.hf import CheckpointInfo, Extension, get_extension, install, load_model
from e2llm.hf.packed import KeyValuePages
from e2llm.hf.packed_model import PackedModel
from e2llm.infer import RequestPlan, end_tokens, reads_in_chunks
from e2llm.positions.choose import Policy, Schedule

PAGE_TOKENS = 16
MAX_RUNNING = {"cuda": 256, "cpu": 64}
CHUNK_TOKENS = {"cuda": 4096, "cpu": 512}
TURNED_SCALES = 16
"""Scales whose cached keys are looked through for a text, with `rerotate`."""

_log = logging.getLogger(__name__)


class BatchEngine:
    """Serves many requests at once from one model, which is the engine's own until `close`.

    `max_scale`: as in `infer.Engine`. `max_running`: requests in one batch at most; `chunk_tokens`: prompt tokens a
    step reads at most, over all requests. `kv_tokens` or `kv_bytes`: memory for keys and values; with neither, on CUDA
    80 % of what is free once the model is loaded, on a CPU a quarter of the free memory and at most 4 GiB, and never
    more than `max_running` requests of the largest trained window can use. `prefix_cache`: keep the pages of finished
    requests for those that begin alike.

    `attention`: `kernels` in Triton, `plain` gathering, or `auto`: kernels on CUDA, else plain; `stats` says which.
    `graphs`: record decoding steps as CUDA graphs, a batch size when it first comes (some tenths of a second each), or
    with `one_graph` the largest alone, with empty places where fewer decode: for an engine that lives for seconds.
    `run_ahead`: queue a step before the last one's tokens are read (None: on CUDA). `rerotate`: a text cached at
    another scale (a conversation that outgrew its own) goes on from those keys, turned, instead of being read again:
    fast, and approximate (`hf/rerotate.py`); what comes of it is never shared with an exact request. Raises ValueError
    for a model that must read each prompt alone, and on CUDA where Triton is missing.
    """

    name = "e2llm"

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        policy: Policy = "ladder",
        max_scale: float | None = None,
        info: CheckpointInfo | None = None,
        page_tokens: int = PAGE_TOKENS,
        kv_tokens: int | None = None,
        kv_bytes: int | None = None,
        max_running: int | None = None,
        chunk_tokens: int | None = None,
        prefix_cache: bool = True,
        attention: Attention = "auto",
        graphs: bool = True,
        one_graph: bool = False,
        run_ahead: bool | None = None,
        rerotate: bool = False,
    ) -> None:
        kind = model.device.type
        self.max_running = MAX_RUNNING.get(kind, MAX_RUNNING["cpu"]) if max_running is None else max_running
        self.chunk_tokens = CHUNK_TOKENS.get(kind, CHUNK_TOKENS["cpu"]) if chunk_tokens is None else chunk_tokens
        self.page_tokens = page_tokens
        for name in ("page_tokens", "max_running", "chunk_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: use at least 1")
        if rerotate and not prefix_cache:
            raise ValueError("rerotate = True and prefix_cache = False: what is turned is found in the prefix cache")
        if not reads_in_chunks(model):
            raise ValueError(
                f"model type {model.config.model_type!r} carries a state from token to token, which pages of keys do "
                "not hold; serve it with infer.Engine, one request at a time"
            )
        kernels = choose_attention(attention, model.device) == "kernels"
        self._run_ahead = kind == "cuda" if run_ahead is None else run_ahead
        self.model, self.tokenizer, self.policy, self.info = model.eval(), tokenizer, policy, info
        self.extension: Extension = get_extension(model) or install(model)
        self.native_window: int = self.extension.native_window
        self.max_scale = self.extension.max_scale if max_scale is None else float(max_scale)
        self.schedule: Schedule = self.extension.schedule
        self._ends = end_tokens(model, tokenizer)
        self._share = prefix_cache
        self._packed = packed = PackedModel(model, self.extension, kernels=kernels)
        self.read_bytes = packed.read_bytes
        largest = int(self.native_window * self.max_scale)
        try:
            num_pages = kv_pages(
                packed.token_bytes,
                page_tokens,
                packed.device,
                self.max_running * largest,
                tokens=kv_tokens,
                total_bytes=kv_bytes,
            )
            self._store = KeyValuePages(packed.shapes, num_pages, page_tokens, packed.device)
            self._forward = Forward(
                *(packed, self._store, self.max_running, num_pages, largest),
                record=graphs,
                one_size=one_graph,
                rerotate=rerotate,
            )
        except BaseException:
            packed.restore()
            raise
        self._pages = Pages(num_pages)
        self._waiting: deque[Running] = deque()
        self._running: list[Running] = []
        self._prompt_total = self._cached_total = self._output_total = self._turned_total = 0
        self._rerotate = rerotate
        self._cached_scales: dict[float, None] = {}  # least recently used first
        self._closing: str | None = None
        self._failure: BaseException | None = None
        self._threads = torch.get_num_threads()
        self._wake = threading.Condition()
        self._worker = threading.Thread(target=self._work, name="e2llm-batch-engine", daemon=True)
        self._worker.start()
        atexit.register(self.close)  # a thread inside a kernel would crash an interpreter that ends

    @classmethod
    def load(cls, path: str, **options: Any) -> BatchEngine:
        """Engine over a checkpoint folder, hub name or .gguf file; `options` are those of the engine and of
        `hf.load_model`."""
        own = {name: options.pop(name) for name in inspect.signature(cls).parameters if name in options}
        model, tokenizer, info = load_model(path, **options)
        return cls(model, tokenizer, info=info, **own)

    def submit(self, request: Request) -> QueueStream:
        """Take a request; returns at once. Thread-safe.

        Raises RefusedError for one longer than the largest trained window (unless `beyond_trained`) or than the whole
        key-value memory, ValueError for one that makes no sense, RuntimeError once the engine is closed.
        """
        plan = self._plan(request)
        admission = Admission(
            plan.scale, plan.window, len(request.prompt_ids), plan.max_new_tokens, tuple(plan.warnings)
        )
        stream = QueueStream(admission, self._notify)
        row = Running(request, stream, self.tokenizer, self._ends, self.page_tokens)
        with self._wake:
            if self._failure is not None:
                raise RuntimeError(f"the engine has failed: {self._failure!r}") from self._failure
            if self._closing is not None:
                raise RuntimeError("the engine is closed")
            self._waiting.append(row)
            self._wake.notify()
        return stream

    def stats(self) -> EngineStats:
        with self._wake:
            return EngineStats(
                running=len(self._running),
                waiting=len(self._waiting),
                kv_tokens_used=self._pages.used * self.page_tokens,
                kv_tokens_total=self._pages.num_pages * self.page_tokens,
                prompt_tokens_total=self._prompt_total,
                cached_tokens_total=self._cached_total,
                output_tokens_total=self._output_total,
                attention=self._forward.describe(),
                turned_tokens_total=self._turned_total,
            )

    @property
    def token_bytes(self) -> int:
        """Bytes of key-value memory that a token takes."""
        return self._packed.token_bytes

    def clear_prefix_cache(self) -> None:
        """Forget what finished requests left behind."""
        with self._wake:
            self._pages.clear_idle()

    def close(self, *, drain: bool = False) -> None:
        """Stop the worker and give the model its own attention back; with `drain` when all requests taken are done,
        else they end as `cancelled`. A close without `drain` cuts one with `drain` short."""
        with self._wake:
            if self._closing != "now":
                self._closing = "drain" if drain else "now"
            self._wake.notify()
        self._worker.join()
        atexit.unregister(self.close)

    def __enter__(self) -> BatchEngine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _notify(self) -> None:
        with self._wake:
            self._wake.notify()

    def _plan(self, request: Request) -> RequestPlan:
        """Scale, window and length of a request, checked against what was trained and what memory there is."""
        prompt = len(request.prompt_ids)
        if not all(0 <= token < self._packed.vocabulary for token in request.prompt_ids):
            raise ValueError(f"prompt_ids: tokens are 0 to {self._packed.vocabulary - 1}, the model's vocabulary")
        if request.sampling.stop and self.tokenizer is None:
            raise ValueError(f"stop = {request.sampling.stop!r}: an engine without a tokenizer knows no text")
        plan = plan_trained(
            prompt,
            native_window=self.native_window,
            max_scale=self.max_scale,
            policy=self.policy,
            schedule=self.schedule,
            max_new_tokens=request.max_new_tokens,
            scale=request.scale,
            beyond_trained=request.beyond_trained,
        )
        if self.extension.rope.max_scale is not None and plan.scale > self.extension.rope.max_scale:
            raise RefusedError(
                f"scale = {plan.scale:g}: the model's frequencies reach {self.extension.rope.max_scale:g}"
            )
        needed = pages_needed(prompt, plan.max_new_tokens, self.page_tokens)
        if needed > self._pages.num_pages:
            raise RefusedError(
                f"prompt ({prompt}) + new tokens ({plan.max_new_tokens}) need {needed * self.page_tokens} key-value "
                f"slots: this engine has {self._pages.num_pages * self.page_tokens}; shorten the request, or give the "
                "engine more kv_tokens"
            )
        return plan

    # ---- the worker thread

    def _work(self) -> None:
        torch.set_num_threads(self._threads)  # OpenMP keeps the number a thread; a new one would take every core
        if self._packed.device.type == "cuda":
            torch.cuda.set_device(self._packed.device)
        try:
            with torch.inference_mode():
                self._run()
        except BaseException as error:
            _log.exception("the batch engine's thread ended")
            with self._wake:
                self._failure = error
                self._end_all("error", f"the engine failed: {error!r}")
        finally:
            self._packed.restore()

    def _run(self) -> None:
        """Step after step until the engine is closed. What was queued is read when the next step is queued behind it,
        or there is none."""
        queued: Flight | None = None
        while (step := self._next(may_wait=queued is None)) is not None:
            flight = self._launch(step) if step else None
            if queued is not None:
                self._land(queued)
            queued = flight
            if queued is not None and not self._run_ahead:
                self._land(queued)
                queued = None

    def _next(self, *, may_wait: bool) -> Step | None:
        """The next step, empty where there is nothing to queue and it may not wait for more; None when the engine is
        closed."""
        with self._wake:
            while True:
                self._drop_cancelled()
                if self._closing == "now":
                    self._end_all("cancelled")
                self._admit()
                if self._running:
                    if self._share:
                        self._adopt()
                    return next_step(self._running, self.chunk_tokens, share=self._share)
                if not may_wait:
                    return []
                if self._closing is not None and not self._waiting:
                    return None
                self._wake.wait()

    def _admit(self) -> None:
        places = self.max_running - len(self._running)
        for row in admit(self._waiting, self._pages, places, share=self._share, scales=list(self._cached_scales)):
            # A masked key counts nothing only where its value is finite.
            if distrusted := self._pages.to_wipe(row.table.tolist()):
                self._store.wipe(distrusted)
            self._cached_total += row.computed
            self._running.append(row)
            self._forward.enter(row)
            if self._rerotate:
                self._turn(row)

    def _turn(self, row: Running) -> None:
        """Keys of another scale, where the request goes on from such; its own may be gone on from later."""
        if row.turning is not None:
            turning, row.turning = row.turning, None
            try:
                self._forward.turn(turning, row.scale)
                self._turned_total += row.turned
            except Exception as error:
                self._failed([row], error)
            self._pages.release(turning.sources)
        self._cached_scales.pop(row.scale, None)
        self._cached_scales[row.scale] = None
        if len(self._cached_scales) > TURNED_SCALES:
            del self._cached_scales[next(iter(self._cached_scales))]

    def _adopt(self) -> None:
        """What others have read since, and need not be read again."""
        for row in self._running:
            if adopted := row.adopt(self._pages):
                self._cached_total += adopted
                self._forward.moved(row)

    def _drop_cancelled(self) -> None:
        for row in [row for row in (*self._running, *self._waiting) if row.stream.cancelled]:
            self._end(row, Output(finish_reason="cancelled"))

    def _end(self, row: Running, output: Output) -> None:
        """Memory first, then the last output: who has read it finds the memory free."""
        row.release(self._pages)
        row.ended = True
        if row in self._running:
            self._running.remove(row)
            self._forward.leave(row)
        else:
            self._waiting.remove(row)
        row.stream.put(output)

    def _end_all(self, reason: FinishReason, error: str | None = None) -> None:
        for row in (*self._running, *self._waiting):
            self._end(row, Output(finish_reason=reason, error=error))

    def _launch(self, step: Step) -> Flight | None:
        """Queue a step; None where that failed."""
        try:
            flight = self._forward.launch(step)
        except Exception as error:
            self._failed([row for row, _ in step], error)
            return None
        with self._wake:
            for row, count in step:
                if not row.decoding:
                    self._prompt_total += count
                row.advance(count, self._pages, self._share)
            for row in flight.asking:
                row.pending += 1
        return flight

    def _land(self, flight: Flight) -> None:
        """Read what a step has drawn, and hand it on. Who has ended since gets nothing."""
        try:
            drawn = flight.read()
        except Exception as error:
            self._failed([row for row, _ in flight.step], error)
            return
        for row, one in zip(flight.asking, drawn, strict=True):
            if row.ended:
                continue
            row.pending -= 1
            if one is None:
                self._fail([row], "the model's logits are no numbers (NaN or infinite)")
                continue
            output = row.extend(one.token, one.logprob)
            with self._wake:
                self._output_total += 1
                if output.finish_reason is not None:
                    self._end(row, output)
                    continue
            row.stream.put(output)

    def _failed(self, rows: list[Running], error: Exception) -> None:
        """Out of memory, a kernel that fails: these requests end, the engine goes on."""
        self._fail(rows, f"{type(error).__name__}: {error}")
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()

    def _fail(self, rows: list[Running], message: str) -> None:
        """End `rows`; what their pages hold may be anything."""
        with self._wake:
            for row in rows:
                if not row.ended:
                    self._pages.distrust(row.table.tolist())
                    self._end(row, Output(finish_reason="error", error=message))
