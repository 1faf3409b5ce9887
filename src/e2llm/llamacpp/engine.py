"""llama.cpp as a serving engine: one file of weights, a context for each scale over them, a scale for each request.

Flows in: `Request`s from any thread. Flows out: streams of `Output`s. One worker thread runs the steps: in turn each
context computes the next token of every request in it that decodes and a piece of its prompts. Scale and memory are
fixed when a request is admitted. Prompts are tokens of the checkpoint's own tokenizer. Far keys of method self_extend
are moved to the places of their groups as a text grows (`positions.frames`). Knows no HTTP.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from e2llm.engine.memory import kv_pages
from e2llm.engine.planning import plan_trained
from e2llm.engine.request import Admission, EngineStats, FinishReason, Output, RefusedError, Request
from e2llm.engine.running import Running
from e2llm.engine.sampling import Drawn, draw
from e2llm.engine.schedule import next_step
from e2llm.engine.stream import QueueStream
from e2llm.export.gguf_context import context_rope
from e2llm.infer import RequestPlan
from e2llm.llamacpp.contexts import Contexts, Held
from e2llm.llamacpp.convert import find_gguf
from e2llm.llamacpp.gguf_model import configured_ends, read_gguf, read_tokenizer
from e2llm.llamacpp.library import KV_TYPES, Context, Piece, Weights, load_library
from e2llm.llamacpp.rooms import CELLS, padded
from e2llm.positions.frames import Frame

MAX_RUNNING = 64
CHUNK_TOKENS = 512

_log = logging.getLogger(__name__)


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class LlamaCppEngine:
    """Serves one GGUF file. `path` is the file; `e2llm.json` and the tokenizer are looked for beside it.

    `max_scale`: as in `infer.Engine`. `max_running`: requests of one scale in one pass at most; `chunk_tokens`: prompt
    tokens that a pass reads at most. `kv_tokens` or `kv_bytes`: memory for keys and values of all contexts; with
    neither a quarter of the free memory and at most 4 GiB. `kv_type`: f16, or f32 (None: f32 for a file of float32).
    `threads`: None for all cores this process may use. `gpu_layers`: layers for a GPU, where llama.cpp was built for
    one. Raises ValueError for files that this engine does not serve.
    """

    name = "llamacpp"

    def __init__(
        self,
        path: str | Path,
        *,
        max_scale: float | None = None,
        kv_tokens: int | None = None,
        kv_bytes: int | None = None,
        kv_type: str | None = None,
        max_running: int | None = None,
        chunk_tokens: int = CHUNK_TOKENS,
        threads: int | None = None,
        gpu_layers: int = 0,
    ) -> None:
        load_library()
        self.max_running = MAX_RUNNING if max_running is None else min(max_running, MAX_RUNNING)
        self.chunk_tokens = chunk_tokens
        self._threads = usable_cores() if threads is None else threads
        for name, value in (
            ("max_running", self.max_running),
            ("chunk_tokens", chunk_tokens),
            ("threads", self._threads),
        ):
            if value < 1:
                raise ValueError(f"{name} = {value}: use at least 1")
        self.file = file = read_gguf(Path(path).expanduser())
        self._kv_type = kv_type or ("f32" if file.stored_as_float32 else "f16")
        if self._kv_type not in KV_TYPES:
            raise ValueError(f"kv_type = {kv_type!r}: choose one of {', '.join(KV_TYPES)}")
        self.native_window, self.schedule, self.notes = file.native_window, file.schedule, file.notes
        self.max_scale = file.max_scale if max_scale is None else float(max_scale)
        self._frames = file.frames
        self.tokenizer = read_tokenizer(file.path)
        token_bytes = file.kv_values * KV_TYPES[self._kv_type][1]
        most = self.max_running * int(self.native_window * self.max_scale)
        cells = CELLS * kv_pages(token_bytes, CELLS, torch.device("cpu"), most, tokens=kv_tokens, total_bytes=kv_bytes)
        self._weights = Weights(file.path, file.architecture, gpu_layers=gpu_layers)
        configured = configured_ends(file.path, self.tokenizer)
        self._ends = self._weights.end_tokens() if configured is None else configured
        self._contexts = Contexts(cells, self.max_running, self._open)
        self._waiting: deque[Running] = deque()
        self._running: list[Running] = []
        self._prompt_total = self._output_total = 0
        self._closing: str | None = None
        self._failure: BaseException | None = None
        self._wake = threading.Condition()
        self._torch_threads = torch.get_num_threads()
        self._worker = threading.Thread(target=self._work, name="e2llm-llamacpp-engine", daemon=True)
        self._worker.start()
        atexit.register(self.close)

    @classmethod
    def load(
        cls,
        name: str,
        *,
        dtype: str | None = None,
        device: str | None = None,
        tell: Callable[[str], None] = _to_stderr,
        **options: Any,
    ) -> LlamaCppEngine:
        """Engine over a .gguf file, a folder with one, or a checkpoint, which is written as GGUF once (`convert`).

        `dtype`: how that GGUF stores its matrices; bfloat16 by default. `device`: cpu, or cuda for all layers on a GPU.
        """
        if device not in (None, "cpu", "cuda"):
            raise ValueError(f"device = {device!r}: this engine runs on cpu, or cuda (the first GPU)")
        load_library()
        if device == "cuda" and not load_library().llama_supports_gpu_offload():
            raise ValueError(
                "device = 'cuda': this llama-cpp-python was built without a GPU; build it with one, or use cpu"
            )
        made = cls(find_gguf(name, dtype=dtype, tell=tell), gpu_layers=-1 if device == "cuda" else 0, **options)
        for note in made.notes:
            tell(note)
        return made

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
        row = Running(request, stream, self.tokenizer, self._ends, 1)
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
                kv_tokens_used=self._contexts.used,
                kv_tokens_total=self._contexts.total,
                prompt_tokens_total=self._prompt_total,
                cached_tokens_total=0,
                output_tokens_total=self._output_total,
            )

    def contexts(self) -> dict[float, int]:
        """Scale -> key-value slots of the context that it has now."""
        with self._wake:
            return self._contexts.sizes

    def close(self, *, drain: bool = False) -> None:
        """Stop the worker and free everything; with `drain` when all requests taken are done, else they end as
        `cancelled`. A close without `drain` cuts one with `drain` short."""
        with self._wake:
            if self._closing != "now":
                self._closing = "drain" if drain else "now"
            self._wake.notify()
        self._worker.join()
        atexit.unregister(self.close)

    def __enter__(self) -> LlamaCppEngine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _notify(self) -> None:
        with self._wake:
            self._wake.notify()

    def _plan(self, request: Request) -> RequestPlan:
        """Scale, window and length of a request, checked against what was trained and what memory there is."""
        prompt = len(request.prompt_ids)
        if not all(0 <= token < self._weights.vocabulary for token in request.prompt_ids):
            raise ValueError(f"prompt_ids: tokens are 0 to {self._weights.vocabulary - 1}, the model's vocabulary")
        plan = plan_trained(
            prompt,
            native_window=self.native_window,
            max_scale=self.max_scale,
            schedule=self.schedule,
            max_new_tokens=request.max_new_tokens,
            scale=request.scale,
            beyond_trained=request.beyond_trained,
        )
        if plan.scale > 1 and self.file.method == "none" and request.scale is not None:
            raise RefusedError(
                f"scale = {plan.scale:g}: the frequencies of {self.file.path.name} are fixed; leave it out"
            )
        total = prompt + plan.max_new_tokens
        if padded(total - 1) > self._contexts.total:
            raise RefusedError(
                f"prompt ({prompt}) + new tokens ({plan.max_new_tokens}) need a context of {padded(total - 1)} "
                f"key-value slots: this engine has {self._contexts.total}; shorten the request, or give the engine "
                "more kv_tokens"
            )
        return plan

    # ---- the worker thread

    def _open(self, scale: float, cells: int) -> Context:
        file = self.file
        context = self._weights.context(
            context_rope(file.rope, file.method, scale, file.slope),
            cells,
            sequences=self.max_running,
            batch_tokens=self.chunk_tokens + self.max_running,
            kv_type=self._kv_type,
            threads=self._threads,
        )
        if self._frames(scale) is not None and not context.can_move:
            context.close()
            raise ValueError(
                f"method = 'self_extend' at scale {scale:g}: llama.cpp cannot move the cached keys of architecture "
                f"{file.architecture!r}; serve with --engine e2llm"
            )
        return context

    def _work(self) -> None:
        torch.set_num_threads(self._torch_threads)  # OpenMP keeps the number a thread
        try:
            while self._next():
                for held, rows in self._contexts.rows():
                    self._step(held, rows)
        except BaseException as error:
            _log.exception("the engine's thread ended")
            with self._wake:
                self._failure = error
                self._end_all("error", f"the engine failed: {error!r}")
        finally:
            with self._wake:
                self._contexts.close()
                self._weights.close()

    def _next(self) -> bool:
        """Wait until there is something to compute; False when the engine is closed."""
        with self._wake:
            while True:
                for row in [row for row in (*self._running, *self._waiting) if row.stream.cancelled]:
                    self._end(row, Output(finish_reason="cancelled"))
                if self._closing == "now":
                    self._end_all("cancelled")
                self._admit()
                if self._running:
                    return True
                if self._closing is not None and not self._waiting:
                    return False
                self._wake.wait()

    def _admit(self) -> None:
        """First come, first served: while the first one waits for memory, all wait."""
        while self._waiting:
            row = self._waiting[0]
            try:
                if not self._contexts.admit(row):
                    return
            except Exception as error:  # no memory for the context, or frequencies that cannot be told
                self._end(row, Output(finish_reason="error", error=f"{type(error).__name__}: {error}"))
                continue
            self._running.append(self._waiting.popleft())

    def _end(self, row: Running, output: Output) -> None:
        """Memory first, then the last output: who has read it finds the memory free."""
        self._contexts.leave(row)
        (self._running if row in self._running else self._waiting).remove(row)
        row.stream.put(output)

    def _end_all(self, reason: FinishReason, error: str | None = None) -> None:
        for row in (*self._running, *self._waiting):
            self._end(row, Output(finish_reason=reason, error=error))

    def _step(self, held: Held, rows: list[Running]) -> None:
        """One pass of a context."""
        chunk = min(self.chunk_tokens, held.context.batch_tokens - len(rows))
        step = [self._in_one_frame(row, count) for row, count in next_step(rows, max(chunk, 1), share=False)]
        asking = [row for row, count in step if count == row.remaining]
        try:
            drawn = self._compute(held, step, asking)
        except Exception as error:  # these requests end, the engine goes on
            with self._wake:
                for row, _ in step:
                    self._end(row, Output(finish_reason="error", error=f"{type(error).__name__}: {error}"))
            return
        with self._wake:
            for row, count in step:
                self._prompt_total += 0 if row.new_tokens else count
                row.computed += count
        for row, one in zip(asking, drawn, strict=True):
            self._deliver(row, one)

    def _in_one_frame(self, row: Running, count: int) -> tuple[Running, int]:
        frames = self._frames(row.scale)
        return row, count if frames is None or row.decoding else frames.piece_of(row.computed, count)

    def _position(self, held: Held, row: Running, count: int) -> int:
        """Of the next `count` tokens' first one, once the keys before it stand where these are to see them."""
        frames = self._frames(row.scale)
        if frames is None:
            return row.computed
        old = held.frames.get(row, Frame())
        new = frames.next(old, row.computed, count, decoding=row.decoding)
        held.context.move(held.seats[row], frames.moves(old, new, row.computed))
        held.frames[row] = new
        return row.computed - new.back

    def _compute(self, held: Held, step: list[tuple[Running, int]], asking: list[Running]) -> list[Drawn | None]:
        wanted = set(asking)
        pieces = [
            Piece(
                held.seats[row],
                self._position(held, row, count),
                row.tokens[row.computed : row.computed + count],
                row in wanted,
            )
            for row, count in step
        ]
        logits = torch.from_numpy(held.context.compute(pieces))
        return draw(logits, [row.request.sampling for row in asking], [row.source for row in asking]) if asking else []

    def _deliver(self, row: Running, one: Drawn | None) -> None:
        if one is None:
            with self._wake:
                message = "the model's logits are no numbers (NaN or infinite)"
                self._end(row, Output(finish_reason="error", error=message))
            return
        output = row.extend(one.token, one.logprob)
        with self._wake:
            self._output_total += 1
            if output.finish_reason is not None:
                self._end(row, output)
                return
        row.stream.put(output)
