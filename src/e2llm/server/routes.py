"""The API's addresses. Each reads a validated body, makes a `Job` and hands it to `answer`.

Flows in: HTTP. Flows out: OpenAI's forms (`shapes`), errors included (`errors`).
"""

from __future__ import annotations

import json
from typing import Any

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from e2llm.infer import plan_request
from e2llm.server import schemas, shapes
from e2llm.server.answer import answer
from e2llm.server.edge import record_of
from e2llm.server.errors import ApiError
from e2llm.server.logs import RequestRecord
from e2llm.server.prompts import read_messages, read_prompts
from e2llm.server.service import Service

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": shapes.ErrorBody, "description": text}
    for status, text in {
        400: "What was sent cannot be served; `message` says why and `param` where.",
        401: "No valid API key.",
        404: "No such model.",
        413: "The body is too large.",
        429: "Too many requests: come back after `Retry-After` seconds.",
        503: "The server is shutting down.",
        504: "Not complete within the time limit.",
    }.items()
}
_SCALE_HEADERS = {
    "X-E2LLM-Scale": {"schema": {"type": "string"}, "description": "Scale of the largest window in this answer."},
    "X-E2LLM-Window": {"schema": {"type": "string"}, "description": "That window, in tokens."},
}


def _generates(model: Any) -> dict[int | str, dict[str, Any]]:
    events = {"text/event-stream": {"schema": {"type": "string"}}}
    description = "The answer, or with `stream` server-sent events that end with `data: [DONE]`."
    whole = {"model": model, "description": description, "content": events, "headers": _SCALE_HEADERS}
    return {200: whole, **_ERRORS}


_IGNORED = ", ".join(schemas.IGNORED)
_NOTE = (
    f" Fields it does not know are refused by name. Accepted and ignored, because they mean nothing here: {_IGNORED}."
    " Accepted at their neutral value only: those whose description says so. `e2llm` in the answer (in a stream: in"
    " the first and the last chunk of each choice) says at which scale and window it ran."
)


def build_router(service: Service) -> APIRouter:
    """All addresses but the page's."""
    router = APIRouter()
    tokenizer = service.engine.tokenizer

    completions = "Continue a text." + _NOTE
    chat = "Answer a conversation through the model's chat template; 400 where it has none." + _NOTE

    @router.post("/v1/completions", responses=_generates(shapes.Completion), description=completions)
    async def create_completion(body: schemas.CompletionRequest, http: Request) -> Response:
        _log_prompt(service, record_of(http.scope), body.prompt)
        job = await service.completion_job(body, http.scope["e2llm.arrived"])
        return await answer(service, job, http, record_of(http.scope))

    @router.post("/v1/chat/completions", responses=_generates(shapes.Chat), description=chat)
    async def create_chat(body: schemas.ChatRequest, http: Request) -> Response:
        _log_prompt(service, record_of(http.scope), [message.model_dump() for message in body.messages])
        job = await service.chat_job(body, http.scope["e2llm.arrived"])
        return await answer(service, job, http, record_of(http.scope))

    @router.post("/v1/tokenize", responses=_ERRORS, description=schemas.TokenizeRequest.__doc__ or "")
    async def tokenize(body: schemas.TokenizeRequest) -> shapes.Tokenized:
        service.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "Give either prompt or messages.", code="invalid_value", param="prompt")
        if body.messages is not None:
            count = len(await service.read(read_messages, body.messages, tokenizer))
        else:
            assert body.prompt is not None, "checked above"
            count = len((await service.read(read_prompts, body.prompt, tokenizer))[0]) if body.prompt else 0
        return preview(service, count, body)

    @router.get("/v1/models", responses=_ERRORS)
    async def list_models() -> shapes.Models:
        return {"object": "list", "data": [service.model_card()]}

    @router.get("/v1/models/{name:path}", responses=_ERRORS)
    async def get_model(name: str) -> shapes.Model:
        service.check_model(name)
        return service.model_card()

    @router.get("/health", responses={503: {"model": shapes.ErrorBody}})
    async def health() -> shapes.Health:
        stats = service.engine.stats()
        name, engine = service.settings.model_name, service.engine.name
        return {"status": "ok", "model": name, "engine": engine, "running": stats.running, "waiting": stats.waiting}

    @router.get("/metrics", responses={200: {"content": {"text/plain": {}}}}, response_class=Response)
    async def metrics() -> Response:
        return Response(service.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)

    return router


def preview(service: Service, count: int, body: schemas.TokenizeRequest) -> shapes.Tokenized:
    """The plan of a prompt of `count` tokens, as the engine would make it; nothing runs."""
    engine = service.engine
    out: shapes.Tokenized = {
        "count": count,
        "max_model_len": service.max_window,
        "max_new_tokens": None,
        "scale": None,
        "window": None,
        "fits": False,
        "warnings": [],
    }
    try:
        plan = plan_request(
            count,
            native_window=engine.native_window,
            max_scale=engine.max_scale,
            schedule=engine.schedule,
            max_new_tokens=service.output_limit(body.max_tokens),
            scale=body.scale,
        )
    except ValueError as error:
        return {**out, "warnings": [str(error)]}
    fits = count + plan.max_new_tokens <= service.max_window and plan.scale <= engine.max_scale
    return {
        **out,
        "max_new_tokens": plan.max_new_tokens,
        "scale": plan.scale,
        "window": plan.window,
        "fits": fits,
        "warnings": list(plan.warnings),
    }


def _log_prompt(service: Service, record: RequestRecord, prompt: Any) -> None:
    if service.settings.log_prompts:
        record.fields["prompt"] = prompt if isinstance(prompt, str) else json.dumps(prompt)
