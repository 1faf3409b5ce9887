"""Errors as OpenAI's clients read them: {"error": {"message", "type", "param", "code"}}, for every status.

Flows in: our own `ApiError`, FastAPI's validation errors, unknown routes. Flows out: JSON responses. A value that a
client sent is shown shortened or not at all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
CODE = "e2llm.error_code"
"""Where the code of the error that was answered stands in the ASGI scope, for log and counters."""
_CODES = {404: "not_found", 405: "method_not_allowed"}


class ApiError(HTTPException):
    """A refusal with its status. Derived from Starlette's, so that it passes FastAPI's reading of bodies unchanged."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status_code=status, detail=message, headers=headers)
        self.code, self.param = code, param

    def body(self) -> dict[str, Any]:
        return error_body(self.status_code, self.detail, code=self.code, param=self.param)

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status_code, headers=self.headers)


def error_body(status: int, message: str, *, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """The one form of all errors; its type follows from the status."""
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def busy(message: str, code: str, retry_seconds: float) -> ApiError:
    """429 with Retry-After in whole seconds, at least one."""
    return ApiError(429, message, code=code, headers={"Retry-After": str(max(1, math.ceil(retry_seconds)))})


def shown(text: str, limit: int = 80) -> str:
    """A client's text, quoted and shortened, safe to send back."""
    return ascii(text if len(text) <= limit else text[:limit] + "…")


def _field(location: Sequence[Any]) -> str:
    """('body', 'messages', 0, 'content') -> messages.0.content; the arms of a union, which pydantic adds, left out."""
    inside = [str(part) for part in location if part != "body"]
    kept = inside[:1] + [p for p in inside[1:] if p.isdigit() or p.isidentifier()]
    while len(kept) > 1 and kept[-1] in {"str", "int", "float", "bool", "dict"}:
        kept.pop()
    return shown(".".join(kept))[1:-1]


def validation_error(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong with a body, named by its field.

    Of a field that may have several types pydantic lists every one that it is not: what says more comes first.
    """
    errors = error.errors()
    same = [e for e in errors if e["loc"][:2] == errors[0]["loc"][:2]]
    first = min(same, key=lambda e: (e["type"].endswith("_type"), -len(e["loc"])))
    kind, location = first["type"], first["loc"]
    if kind == "json_invalid":
        reason = first.get("ctx", {}).get("error", "")
        place = location[-1] if isinstance(location[-1], int) else 0
        return ApiError(400, f"The body is not valid JSON: {reason} at character {place}.", code="invalid_json")
    field = _field(location)
    if not field:
        return ApiError(400, "The body must be a JSON object, sent as application/json.", code="invalid_json")
    if kind == "extra_forbidden":
        message = f"Unknown field {field!r}: this server does not know it. Leave it out; /openapi.json lists the rest."
        return ApiError(400, message, code="unknown_field", param=field)
    if kind == "missing":
        return ApiError(400, f"Field {field!r} is missing.", code="missing_field", param=field)
    message = str(first["msg"]).removeprefix("Value error, ")
    return ApiError(400, f"{field}: {message[:500]}", code="invalid_value", param=field)


def add_handlers(app: FastAPI) -> None:
    """Every exception that a route may raise, in the one form."""

    def answered(request: Request, error: ApiError) -> JSONResponse:
        request.scope[CODE] = error.code
        return error.response()

    async def on_validation(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return answered(request, validation_error(error))

    async def on_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        if isinstance(error, ApiError):
            return answered(request, error)
        status, message, code = error.status_code, str(error.detail), _CODES.get(error.status_code)
        if status == 404:
            message = f"No such address: {shown(request.method)[1:-1]} {shown(request.url.path)}"
        if status == 400:  # FastAPI's answer to bytes that are no UTF-8, numbers of thousands of digits, deep nesting
            message, code = "The body cannot be read as JSON in UTF-8.", "invalid_json"
        return answered(request, ApiError(status, message, code=code, headers=error.headers))

    app.add_exception_handler(RequestValidationError, on_validation)
    app.add_exception_handler(HTTPException, on_http)
