"""The engine's streams of one HTTP request, as one queue of events on the event loop.

Flows in: a `Job` that has its places. Flows out: (index, Output) and signals (client gone, too late, silence). However
it ends, `close` cancels what still runs, gives the places back and counts.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import threading
import time

from e2llm.engine.request import Output, RefusedError, Stream
from e2llm.server.errors import ApiError
from e2llm.server.forms import Written
from e2llm.server.logs import LOGGER, RequestRecord, where_from
from e2llm.server.service import Job, Service
from e2llm.server.shapes import ScaleInfo, Usage


class Signal(enum.Enum):
    """What happens to a request beside its outputs."""

    GONE = "disconnected"
    LATE = "timeout"
    PING = "ping"


Event = tuple[int, Output] | Signal


class Run:
    """Streams that run. Made on the event loop, after `Gate.enter`; owns the places from then on."""

    def __init__(self, service: Service, job: Job, gone: asyncio.Task[None], record: RequestRecord) -> None:
        self.service, self.job, self.record = service, job, record
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.end: str | None = None
        """How it ended, for the counters; None: as the model did."""
        self._loop = asyncio.get_running_loop()
        self._streams: list[Stream] = []
        self._first_token: float | None = None
        self._closed = False
        self._gone = gone
        self._late: asyncio.TimerHandle | None = None
        self._ping: asyncio.TimerHandle | None = None
        try:
            for request in job.requests:
                self._streams.append(service.engine.submit(request))
        except BaseException as error:
            self.end = "refused"
            self.close()
            raise _refusal(error, service, job) from error
        self.written = [Written(i, stream.admission) for i, stream in enumerate(self._streams)]
        self._start()

    def _start(self) -> None:
        for index, stream in enumerate(self._streams):
            threading.Thread(target=self._pump, args=(index, stream), name="e2llm-stream", daemon=True).start()
        settings = self.service.settings
        left = max(0.0, self.job.arrived + settings.request_timeout_seconds - time.monotonic())
        self._late = self._loop.call_later(left, self.events.put_nowait, Signal.LATE)
        self._gone.add_done_callback(lambda task: None if task.cancelled() else self.events.put_nowait(Signal.GONE))
        if self.job.stream:
            self._schedule_ping()

    def _schedule_ping(self) -> None:
        def ping() -> None:
            self.events.put_nowait(Signal.PING)
            self._schedule_ping()

        self._ping = self._loop.call_later(self.service.settings.ping_seconds, ping)

    def _pump(self, index: int, stream: Stream) -> None:
        """In a thread of its own: the engine's blocking iterator into the loop's queue."""
        # The loop may be closed by the time that a cancelled stream ends: nobody is left to tell.
        with contextlib.suppress(RuntimeError):
            try:
                for output in stream:
                    self._loop.call_soon_threadsafe(self.events.put_nowait, (index, output))
            except Exception as error:
                LOGGER.error("stream failed", extra={"fields": {"exception": where_from(error)}})
                failed = Output(finish_reason="error", error=type(error).__name__)
                self._loop.call_soon_threadsafe(self.events.put_nowait, (index, failed))
            finally:
                stream.cancel()

    async def next_events(self) -> list[Event]:
        """Everything that has happened since the last call; waits for the first."""
        events = [await self.events.get()]
        while not self.events.empty():
            events.append(self.events.get_nowait())
        return events

    def add(self, index: int, output: Output) -> Written:
        """Book one output. Raises ApiError 500 where the engine failed, 503 where it was stopped."""
        written = self.written[index]
        written.text.append(output.text)
        written.num_tokens += len(output.token_ids)
        if output.token_ids and self._first_token is None:
            self._first_token = time.monotonic() - self.job.arrived
            self.service.metrics.first_token.labels(self._scale_label(written)).observe(self._first_token)
        if output.finish_reason in ("stop", "length"):
            written.finish = output.finish_reason
        elif output.finish_reason == "cancelled":
            self.end = "cancelled"
            raise ApiError(503, "The engine was stopped before the answer was complete.", code="engine_stopped")
        elif output.finish_reason == "error":
            self.end = "error"
            LOGGER.error("engine error", extra={"fields": {"request_id": self.record.request_id}})
            raise ApiError(500, f"The engine failed ({output.error}); the log has more.", code="engine_error")
        return written

    @property
    def finished(self) -> bool:
        return all(written.finish is not None for written in self.written)

    def usage(self) -> Usage:
        prompt, new = self.job.num_prompt_tokens, sum(written.num_tokens for written in self.written)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

    def scale_info(self, index: int | None = None) -> ScaleInfo:
        """Of one sequence, or of the one with the largest window."""
        admissions = [written.admission for written in self.written]
        chosen = max(admissions, key=lambda a: a.window) if index is None else admissions[index]
        return {"scale": chosen.scale, "window": chosen.window, "warnings": list(chosen.warnings)}

    def headers(self) -> dict[str, str]:
        info = self.scale_info()
        return {"X-E2LLM-Scale": f"{info['scale']:g}", "X-E2LLM-Window": str(info["window"])}

    def close(self) -> None:
        """Free everything; more than once does no harm."""
        if self._closed:
            return
        self._closed = True
        for stream in self._streams:
            stream.cancel()
        for handle in (self._gone, self._late, self._ping):
            if handle is not None:
                handle.cancel()
        self.service.gate.leave(len(self.job.requests))
        if self.end != "refused":
            self._count()

    def _count(self) -> None:
        metrics, seconds = self.service.metrics, time.monotonic() - self.job.arrived
        for written in self.written:
            label = self._scale_label(written)
            metrics.answers.labels(self.job.form.endpoint, label, self.end or written.finish or "cancelled").inc()
            metrics.output_tokens.labels(label).observe(written.num_tokens)
            metrics.prompt_tokens.labels(label).observe(written.admission.prompt_tokens)
            metrics.seconds.labels(label).observe(seconds)
        info, usage = self.scale_info(), self.usage()
        self.record.fields |= {
            "scale": info["scale"],
            "window": info["window"],
            "prompt_tokens": usage["prompt_tokens"],
            "output_tokens": usage["completion_tokens"],
            "time_to_first_token_seconds": None if self._first_token is None else round(self._first_token, 4),
            "end": self.end or ",".join(sorted({w.finish or "cancelled" for w in self.written})),
        }

    def _scale_label(self, written: Written) -> str:
        return self.service.metrics.scale_label(written.admission.scale)


def _refusal(error: BaseException, service: Service, job: Job) -> BaseException:
    """The engine's refusal as the protocol says it."""
    if isinstance(error, RefusedError):
        largest = service.max_window
        too_long = any(
            len(r.prompt_ids) + (r.max_new_tokens or 1) > largest and not r.beyond_trained for r in job.requests
        )
        code = "context_length_exceeded" if too_long else "request_refused"
        return ApiError(400, str(error), code=code, param="messages" if job.form.endpoint == "chat" else "prompt")
    if isinstance(error, ValueError):
        return ApiError(400, str(error), code="invalid_value")
    if isinstance(error, RuntimeError):
        LOGGER.error("engine refuses work", extra={"fields": {"exception": where_from(error)}})
        headers = {"Retry-After": "5"}
        return ApiError(503, "The engine is shutting down.", code="engine_stopped", headers=headers)
    return error
