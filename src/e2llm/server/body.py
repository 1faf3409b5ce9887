"""A request's body: how long it may be, how long its pieces may take, and what becomes of one that is refused.

Flows in: ASGI messages of one request. Flows out: the same, ApiError 408 or 413, and an answer that its client can
read: where a server closes a connection on which unread bytes lie, the client's machine discards the answer too.
"""

from __future__ import annotations

import asyncio
import contextlib

from starlette.types import Message, Receive, Send

from e2llm.server.errors import ApiError

_CLOSE = {"Connection": "close"}
"""Of an answer before which the body was not read: the connection cannot be used again."""
_LINGER_SECONDS = 5.0
"""How long the rest of a refused body is read and thrown away. Who sends for longer finds the connection closed."""


class Body:
    """The body of one request, counted while the app reads it.

    Args:
        receive: ASGI callable of the server.
        limit: bytes that the whole body may have.
        timeout_seconds: of waiting for one piece of it.
    """

    def __init__(self, receive: Receive, limit: int, timeout_seconds: float) -> None:
        self._receive, self._limit, self._timeout = receive, limit, timeout_seconds
        self._received, self._ended = 0, False

    async def receive(self) -> Message:
        """ASGI's `receive`. Raises ApiError 408 where no piece comes in time, and 413 above the limit."""
        if self._ended:
            return await self._receive()
        try:
            async with asyncio.timeout(self._timeout):
                message = await self._next()
        except TimeoutError:
            self._ended = True  # nothing comes: nothing to wait for after the answer
            raise ApiError(408, "The request's body did not arrive.", code="body_timeout", headers=_CLOSE) from None
        self._received += len(message.get("body", b""))
        if self._received > self._limit:
            raise body_too_large(self._limit)
        return message

    async def send(self, message: Message, send: Send) -> None:
        """ASGI's `send`. An answer ends after the client has sent its body: before, closing would lose the answer."""
        if self._ended or message["type"] != "http.response.body" or message.get("more_body", False):
            await send(message)
            return
        await send({**message, "more_body": True})  # the client may read it now
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LINGER_SECONDS):
                while not self._ended:
                    await self._next()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _next(self) -> Message:
        message = await self._receive()
        self._ended = message["type"] != "http.request" or not message.get("more_body", False)
        return message


def body_too_large(limit: int) -> ApiError:
    """ApiError 413 for a body of more than `limit` bytes."""
    return ApiError(413, f"The body is larger than {limit} bytes.", code="request_too_large", headers=_CLOSE)
