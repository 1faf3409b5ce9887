"""What happens to every HTTP request before a route sees it: an id, a key, a rate, a size; and one line in the log.

Flows in: ASGI messages. Flows out: the same, or a refusal in OpenAI's form. Plain ASGI, because Starlette's
function middleware hides disconnects from the routes.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import time
import uuid
from collections.abc import MutableMapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from e2llm.server.body import Body, body_too_large
from e2llm.server.errors import CODE, ApiError, busy
from e2llm.server.limits import RateLimit
from e2llm.server.logs import LOGGER, RequestRecord, where_from
from e2llm.server.service import Service

GUARDED = "/v1/"
"""Addresses below it need a key and count towards the rate. Page, /health and /metrics tell nothing of any client."""
_COSTS = {"/v1/tokenize": 0.1, "/v1/models": 0.1}
_QUIET = {"/health", "/metrics"}
_UNKNOWN = "unknown"


def record_of(scope: MutableMapping[str, Any]) -> RequestRecord:
    """The log record of a request that came through `Edge`."""
    record: RequestRecord = scope["e2llm.record"]
    return record


class Edge:
    """ASGI middleware around the whole app."""

    def __init__(self, app: ASGIApp, service: Service, routes: frozenset[str]) -> None:
        self.app, self.service, self.routes = app, service, routes
        settings = service.settings
        self._keys = [_digest(key) for key in settings.api_keys]
        rate = settings.requests_per_minute
        self._rate = RateLimit(rate, settings.burst) if rate is not None else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        record, settings = RequestRecord(uuid.uuid4().hex), self.service.settings
        scope["e2llm.record"], scope["e2llm.arrived"] = record, time.monotonic()
        body = Body(receive, settings.max_request_bytes, settings.body_timeout_seconds)
        status = 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"] = record.request_id
                headers["X-Content-Type-Options"] = "nosniff"
            await body.send(message, send)

        try:
            await self._admit(scope, record)
            await self.app(scope, body.receive, sending)
        except ApiError as error:
            scope[CODE] = error.code
            await error.response()(scope, receive, sending)
        except Exception as error:
            self._log_failure(record, error)
            if status == 0:
                failure = ApiError(500, f"Internal error; the log has request {record.request_id}.", code="internal")
                await failure.response()(scope, receive, sending)
        finally:
            self._done(scope, record, status)

    async def _admit(self, scope: Scope, record: RequestRecord) -> None:
        """Raises ApiError 401, 413 and 429."""
        headers, settings = Headers(scope=scope), self.service.settings
        client = scope["client"][0] if scope.get("client") else _UNKNOWN
        if scope["path"].startswith(GUARDED) and scope["method"] != "OPTIONS":
            if self._keys:
                client = record.fields["key"] = self._key(headers.get("authorization", ""))
            wait = self._rate.take(client, _COSTS.get(scope["path"], 1.0)) if self._rate is not None else 0.0
            if wait > 0:
                rate = settings.requests_per_minute
                raise busy(f"More than {rate:g} requests a minute: wait {wait:.1f} s.", "rate_limit_exceeded", wait)
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > settings.max_request_bytes:
            raise body_too_large(settings.max_request_bytes)

    def _key(self, authorization: str) -> str:
        """Which key it is ("key-1", …). Every key is compared, each in constant time. Raises ApiError 401."""
        kind, _, given = authorization.partition(" ")
        digest = _digest(given.strip() if kind.lower() == "bearer" else "")
        matches = [hmac.compare_digest(digest, key) for key in self._keys]
        if not any(matches):
            message = "Give a valid API key: Authorization: Bearer KEY."
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        return f"key-{matches.index(True) + 1}"

    def _log_failure(self, record: RequestRecord, error: Exception) -> None:
        fields: dict[str, Any] = {"request_id": record.request_id, "exception": where_from(error)}
        if self.service.settings.log_prompts:
            fields["message"] = str(error)
        LOGGER.error("internal error", extra={"fields": fields})

    def _done(self, scope: Scope, record: RequestRecord, status: int) -> None:
        path = scope["path"]
        route = path if path in self.routes else "other"  # any address may be asked for; labels must stay few
        self.service.metrics.requests.labels(route, str(status or "none")).inc()
        if scope.get(CODE):
            self.service.metrics.refusals.labels(scope[CODE]).inc()
            record.fields["error"] = scope[CODE]
        client = scope["client"][0] if scope.get("client") else None
        fields = {
            "request_id": record.request_id,
            "client": client,
            "method": scope["method"],
            "path": path,
            "status": status,
            "seconds": round(time.monotonic() - scope["e2llm.arrived"], 4),
            **record.fields,
        }
        level = logging.DEBUG if path in _QUIET else logging.INFO
        LOGGER.log(level, "request", extra={"fields": fields})


def _digest(key: str) -> bytes:
    """Keys of one length, so that comparing takes one time."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
