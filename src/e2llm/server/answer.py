"""From a checked job to its HTTP answer: wait for a place, run, and send it whole or as server-sent events.

A client that leaves is noticed in every phase, and its sequences are cancelled at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from e2llm.server.errors import ApiError, busy
from e2llm.server.limits import FullError
from e2llm.server.logs import RequestRecord
from e2llm.server.run import Run, Signal
from e2llm.server.service import Job, Service

CLIENT_GONE = 499
"""nginx's status for a client that left; for the log, nobody receives it."""
_SEND_GRACE_SECONDS = 5.0


async def answer(service: Service, job: Job, http: HttpRequest, record: RequestRecord) -> Response:
    """The whole life of one request. Raises ApiError for refusals, a full queue and timeouts."""
    gone = asyncio.create_task(_disconnected(http))
    try:
        entered = await _enter(service, job, gone)
    except BaseException:
        gone.cancel()
        raise
    if not entered:
        record.fields["end"] = Signal.GONE.value
        return Response(status_code=CLIENT_GONE)
    run = Run(service, job, gone, record)
    if job.stream:
        return EventStream(run)
    try:
        return await _whole(run)
    finally:
        run.close()


async def _disconnected(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _enter(service: Service, job: Job, gone: asyncio.Task[None]) -> bool:
    """Take the job's places; False where the client left first. Raises ApiError 429 and 504."""
    settings, count = service.settings, len(job.requests)
    left = max(0.0, job.arrived + settings.request_timeout_seconds - time.monotonic())
    entering = asyncio.create_task(service.gate.enter(count))
    try:
        await asyncio.wait({entering, gone}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
    except asyncio.CancelledError:
        await _leave(service, entering, count)
        raise
    service.metrics.queue_seconds.observe(time.monotonic() - job.arrived)
    if entering.done() and not gone.done():
        try:
            entering.result()
        except FullError:
            message = f"{service.gate.running} sequences run and {service.gate.waiting} wait: come back later."
            raise busy(message, "queue_full", _expected_wait(service)) from None
        return True
    await _leave(service, entering, count)
    if gone.done():
        return False
    raise _too_late(service)


async def _leave(service: Service, entering: asyncio.Task[None], count: int) -> None:
    """Give up a place that is waited for, or that was given in this very moment."""
    entering.cancel()
    with contextlib.suppress(asyncio.CancelledError, FullError):
        await entering
        service.gate.leave(count)


def _expected_wait(service: Service) -> float:
    """Seconds until a place may be free: rounds of waiting sequences, a second each. A hint, not a promise."""
    return 1 + service.gate.waiting / service.gate.places


def _too_late(service: Service) -> ApiError:
    seconds = service.settings.request_timeout_seconds
    return ApiError(504, f"The answer was not complete after {seconds:g} seconds.", code="timeout")


async def _whole(run: Run) -> Response:
    """All sequences to their ends, as one JSON object."""
    tokens: list[list[Any]] = [[] for _ in run.written]
    while not run.finished:
        for event in await run.next_events():
            if event is Signal.GONE:
                run.end = event.value
                return Response(status_code=CLIENT_GONE)
            if event is Signal.LATE:
                run.end = event.value
                raise _too_late(run.service)
            if not isinstance(event, Signal):
                run.add(*event)
                tokens[event[0]] += event[1].logprobs
    form = run.job.form
    wanted = run.job.requests[0].sampling.logprobs is not None
    choices = []
    for written in run.written:
        logprobs = form.logprobs(tokens[written.index], written, run.service.texts) if wanted else None
        choices.append(_with_scale(run, form.choice(written, logprobs), written.index))
    body = _envelope(run, form.object_whole) | {"choices": choices, "usage": run.usage(), "e2llm": run.scale_info()}
    return JSONResponse(body, headers=run.headers())


def _with_scale(run: Run, choice: Any, index: int) -> Any:
    """Several prompts may have run at several scales: then each choice says its own."""
    return {**choice, "e2llm": run.scale_info(index)} if len(run.written) > run.job.n else choice


def _envelope(run: Run, kind: str) -> dict[str, Any]:
    return {
        "id": run.job.form.id_prefix + run.record.request_id,
        "object": kind,
        "created": int(time.time()),
        "model": run.service.settings.model_name,
    }


async def _chunks(run: Run) -> AsyncIterator[bytes]:
    """Server-sent events: an opening chunk for each sequence before its first token, pieces, ends, usage, [DONE]."""
    form, head = run.job.form, _envelope(run, run.job.form.object_chunk)
    # With usage asked for, every chunk but the last says null, as OpenAI's do.
    empty_usage = {"usage": None} if run.job.include_usage else {}
    wanted = run.job.requests[0].sampling.logprobs is not None

    def chunk(choice: Any, index: int, *, scale: bool) -> bytes:
        choice = _with_scale(run, choice, index) if scale else choice
        return event(head | {"choices": [choice]} | empty_usage | ({"e2llm": run.scale_info(index)} if scale else {}))

    yield b"".join(chunk(form.opening(written.index), written.index, scale=True) for written in run.written)
    while not run.finished:
        ready: list[bytes] = []
        for found in await run.next_events():
            if found is Signal.GONE:
                run.end = found.value
                return
            if found is Signal.LATE:
                run.end = found.value
                raise _too_late(run.service)
            if found is Signal.PING:
                ready.append(b": still working\n\n")
            if isinstance(found, Signal):
                continue
            index, output = found
            written = run.add(index, output)
            logprobs = form.logprobs(output.logprobs, written, run.service.texts) if wanted else None
            if output.text or (wanted and output.logprobs):
                ready.append(chunk(form.chunk(index, output.text, logprobs, None), index, scale=False))
            if written.finish is not None:
                ready.append(chunk(form.chunk(index, "", None, written.finish), index, scale=True))
        if ready:
            yield b"".join(ready)
    if run.job.include_usage:
        yield event(head | {"choices": [], "usage": run.usage(), "e2llm": run.scale_info()})
    yield b"data: [DONE]\n\n"


def event(data: Any) -> bytes:
    """One server-sent event. ASCII alone, so that no piece of text can look like the end of a line."""
    return b"data: " + json.dumps(data, separators=(",", ":")).encode("ascii") + b"\n\n"


class EventStream(Response):
    """A stream whose sequences are freed however it ends. An error after the first byte becomes its last event."""

    def __init__(self, run: Run) -> None:
        self.run = run
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **run.headers()}
        super().__init__(None, 200, headers, "text/event-stream")
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_body(body: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": body, "more_body": more})

        settings = self.run.service.settings
        deadline = self.run.job.arrived + settings.request_timeout_seconds - time.monotonic() + _SEND_GRACE_SECONDS
        try:
            # A client that stops reading holds up `send`; the deadline ends that too.
            async with asyncio.timeout(max(0.0, deadline)):
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                try:
                    async for piece in _chunks(self.run):
                        await send_body(piece)
                except ApiError as error:
                    await send_body(event(error.body()))
                await send_body(b"", more=False)
        except TimeoutError:
            self.run.end = "stalled"
        except OSError:  # the connection broke while something was sent
            self.run.end = Signal.GONE.value
        except asyncio.CancelledError:  # uvicorn's deadline for running answers when it shuts down
            self.run.end = "shutdown"
            self.run.close()
            stopped = ApiError(503, "The server is shutting down.", code="shutdown")
            await send_body(event(stopped.body()), more=False)
            raise
        finally:
            self.run.close()
