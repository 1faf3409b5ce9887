"""vLLM behind e2llm's own server: the `ServingEngine` protocol over vLLM's `AsyncLLM` with the plugin in it.

Flows in: `Request`s from any thread. Flows out: streams of `Output`s. One thread runs vLLM's event loop; the model runs
in a process of vLLM's. Scale and length are fixed at `submit` by the function that the plugin uses too. Needs vLLM.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.inputs.engine import tokens_input
from vllm.platforms import current_platform
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.metrics.loggers import StatLoggerBase

from e2llm.engine.request import Admission, EngineStats, Output, Request
from e2llm.engine.stream import QueueStream
from e2llm.hf.load import load_tokenizer
from e2llm.vllm_plugin.admission import Wish, admit
from e2llm.vllm_plugin.marking import scaling_of
from e2llm.vllm_plugin.options import check_folder, engine_arguments, parse_options
from e2llm.vllm_plugin.sampling import output_of, sampling_params

_log = logging.getLogger(__name__)
_START_SECONDS = 1800


class _LastStep(StatLoggerBase):
    """What vLLM said of its last step: share of the key-value memory in use, requests that wait."""

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        self.kv_share, self.waiting = 0.0, 0

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        if scheduler_stats is not None:
            self.kv_share = float(scheduler_stats.kv_cache_usage)
            self.waiting = scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs

    def log_engine_initialized(self) -> None:
        pass


class VllmEngine:
    """Serves requests with vLLM, each at its own scale. `arguments`: of vLLM's `AsyncEngineArgs`.

    Raises ValueError where vLLM does not start, with its reason.
    """

    name = "vllm"

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.tokenizer = load_tokenizer(arguments["model"])
        self._last_step: _LastStep | None = None
        self._tasks: dict[QueueStream, asyncio.Task[Output]] = {}
        self._numbers = itertools.count()
        self._prompt_total = self._cached_total = self._output_total = 0
        self._failure: BaseException | None = None
        self._closed = False
        self._lock, self._closing = threading.Lock(), threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="e2llm-vllm", daemon=True)
        self._thread.start()
        try:
            self._llm: AsyncLLM = self._call(self._start(arguments)).result(_START_SECONDS)
        except BaseException as error:
            self._stop_loop()
            if isinstance(error, Exception):
                raise ValueError(f"vLLM did not start: {error}") from error
            raise
        config = self._llm.vllm_config
        scaling = scaling_of(config.model_config)
        assert scaling is not None, "the arguments name the plugin"
        self.scaling = scaling
        self.native_window, self.max_scale, self.schedule = scaling.native_window, scaling.max_scale, scaling.schedule
        self._max_model_len: int = config.model_config.max_model_len
        self._vocabulary: int = config.model_config.get_vocab_size()
        self._kv_tokens = int(config.cache_config.num_gpu_blocks * config.cache_config.block_size)

    @classmethod
    def load(
        cls,
        checkpoint: str,
        *,
        dtype: str | None = None,
        device: str | None = None,
        kv_bytes: int | None = None,
        max_running: int = 64,
        options: str | None = None,
    ) -> VllmEngine:
        """Engine over a checkpoint folder. `options`: further engine arguments of vLLM, a JSON object."""
        if device is not None:
            raise ValueError(f"device = {device!r}: vLLM takes the device that it was built for; leave it out")
        arguments = engine_arguments(
            check_folder(checkpoint),
            dtype=dtype,
            kv_bytes=kv_bytes,
            max_running=max_running,
            is_cpu=current_platform.is_cpu(),
            options=parse_options(options),
        )
        return cls(arguments)

    def submit(self, request: Request) -> QueueStream:
        """Take a request; returns at once. Thread-safe. Raises RefusedError for one that this engine will never serve
        as asked, ValueError for one that makes no sense, RuntimeError once the engine is closed or has failed."""
        if not all(0 <= token < self._vocabulary for token in request.prompt_ids):
            raise ValueError(f"prompt_ids: tokens are 0 to {self._vocabulary - 1}, the model's vocabulary")
        wish = Wish(request.scale, request.beyond_trained)
        count = len(request.prompt_ids)
        plan = admit(self.scaling, count, request.max_new_tokens, wish, self._max_model_len)
        admission = Admission(plan.scale, plan.window, count, plan.max_new_tokens, plan.warnings)
        stream = QueueStream(admission, lambda: self._in_loop(self._cancel, stream))
        with self._lock:
            if self._failure is not None:
                raise RuntimeError(f"the engine has failed: {self._failure!r}") from self._failure
            if self._closed:
                raise RuntimeError("the engine is closed")
            self._in_loop(self._begin, request, stream)
        return stream

    def stats(self) -> EngineStats:
        """vLLM tells its memory with every step: where no request is left, nothing is held."""
        with self._lock:
            unfinished, last = len(self._tasks), self._last_step
            waiting = min(last.waiting, unfinished) if last is not None else 0
            share = last.kv_share if last is not None and unfinished else 0.0
            return EngineStats(
                running=unfinished - waiting,
                waiting=waiting,
                kv_tokens_used=round(share * self._kv_tokens),
                kv_tokens_total=self._kv_tokens,
                prompt_tokens_total=self._prompt_total,
                cached_tokens_total=self._cached_total,
                output_tokens_total=self._output_total,
            )

    def is_memory_free(self) -> bool:
        """Whether vLLM holds no memory for any request; asked of vLLM itself, which then forgets its prefix cache."""
        return bool(self._call(self._llm.reset_prefix_cache()).result(60))

    def close(self, *, drain: bool = False) -> None:
        """Stop vLLM and its processes; with `drain` when all requests taken are done, else they end as `cancelled`.
        More than once does no harm."""
        with self._lock:
            self._closed = True
        with self._closing:
            if not self._loop.is_closed():
                self._call(self._finish(drain)).result()
                self._stop_loop()

    # ---- the event loop's thread

    async def _start(self, arguments: dict[str, Any]) -> AsyncLLM:
        def last_step(vllm_config: Any, engine_index: int = 0) -> _LastStep:
            self._last_step = _LastStep(vllm_config, engine_index)
            return self._last_step

        return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments), stat_loggers=[last_step])

    def _begin(self, request: Request, stream: QueueStream) -> None:
        task = self._loop.create_task(self._run(request, stream))
        with self._lock:
            self._tasks[stream] = task
        task.add_done_callback(lambda done: self._end(stream, done))

    def _cancel(self, stream: QueueStream) -> None:
        if stream in self._tasks:
            self._tasks[stream].cancel()

    def _end(self, stream: QueueStream, task: asyncio.Task[Output]) -> None:
        """Forget the request, then the last output: who has read it finds the memory free."""
        with self._lock:
            del self._tasks[stream]
        # A task that was cancelled before its first step has run nothing.
        stream.put(Output(finish_reason="cancelled") if task.cancelled() else task.result())

    async def _run(self, request: Request, stream: QueueStream) -> Output:
        """Put all outputs but the last into the stream; that one is returned."""
        try:
            return await self._outputs(request, stream)
        except EngineDeadError as error:
            self._failure = error
            return Output(finish_reason="error", error="vLLM's engine has died; its log says why")
        except Exception as error:
            _log.exception("vLLM failed a request")
            return Output(finish_reason="error", error=f"{type(error).__name__}: {error}")

    async def _outputs(self, request: Request, stream: QueueStream) -> Output:
        params = sampling_params(request, stream.admission)
        prompt, started = tokens_input(list(request.prompt_ids)), False
        async for found in self._llm.generate(prompt, params, f"e2llm-{next(self._numbers)}"):
            output = output_of(found.outputs[0], request.sampling.logprobs)
            with self._lock:
                if not started:
                    started, cached = True, found.num_cached_tokens or 0
                    self._cached_total += cached
                    self._prompt_total += len(request.prompt_ids) - cached
                self._output_total += len(output.token_ids)
            if output.finish_reason is not None:
                return output
            stream.put(output)
        return Output(finish_reason="error", error="vLLM ended the request without a reason")

    async def _finish(self, drain: bool) -> None:
        tasks = list(self._tasks.values())  # all: a submit before the close has begun before this
        if not drain:
            for task in tasks:
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        handler = self._llm.output_handler
        if handler is not None:  # before its processes go: it would report their end as a failure
            handler.cancel()
            await asyncio.gather(handler, return_exceptions=True)
        self._llm.shutdown()
        del self._llm  # while its clean-up still finds what it needs

    # ---- any thread

    def _in_loop(self, function: Callable[..., object], *arguments: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nothing is left to cancel
            self._loop.call_soon_threadsafe(function, *arguments)

    def _call(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
