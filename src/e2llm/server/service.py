"""What every route of one app shares: the engine, the limits, the counters, threads for long tokenizations.

Flows in: an engine and settings. Flows out: checked requests for the engine.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from e2llm.engine.request import Request, Sampling, ServingEngine
from e2llm.positions.choose import steps_of
from e2llm.server import schemas, shapes
from e2llm.server.errors import ApiError, shown
from e2llm.server.forms import ChatForm, CompletionForm, Form
from e2llm.server.limits import Gate
from e2llm.server.metrics import Metrics
from e2llm.server.prompts import Ids, has_chat_template, read_messages, read_prompts
from e2llm.server.settings import ServerSettings
from e2llm.server.token_text import TokenText

Result = TypeVar("Result")

DEFAULT_TEMPERATURE = 1.0
"""OpenAI's, where a request names none."""
GREEDY_BELOW = 1e-4
"""Temperatures below it are 0: a division by less loses the probabilities to rounding."""
_SMALLEST_TOP_P = 1e-6
"""Smaller shares keep the most probable token as well, and may be 0 in float32."""
_SEEDS = 2**63


@dataclass(frozen=True, kw_only=True)
class Job:
    """One HTTP request, read and checked; nothing runs yet."""

    form: Form
    requests: tuple[Request, ...]
    """Prompt after prompt, n for each."""
    n: int
    stream: bool
    include_usage: bool
    arrived: float
    """time.monotonic() of its arrival."""

    @property
    def num_prompt_tokens(self) -> int:
        """Each prompt counted once, as OpenAI does."""
        return sum(len(request.prompt_ids) for request in self.requests[:: self.n])


class Service:
    """State of one app; lives on one event loop."""

    def __init__(self, engine: ServingEngine, settings: ServerSettings) -> None:
        self.engine, self.settings = engine, settings
        self.gate = Gate(settings.max_concurrent, settings.max_queue)
        self.metrics = Metrics(engine.stats, self.gate, engine.max_scale)
        self.texts = TokenText(engine.tokenizer)
        self.started = int(time.time())
        self.max_window = int(engine.native_window * engine.max_scale)
        self._readers = ThreadPoolExecutor(2, thread_name_prefix="e2llm-tokenize")

    def close(self) -> None:
        self._readers.shutdown(wait=False, cancel_futures=True)

    async def read(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Run a tokenization without holding up the other clients."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, function, *arguments)

    def check_model(self, name: str | None) -> None:
        """Raises ApiError 404 for any model but the served one."""
        served = self.settings.model_name
        if name is not None and name != served:
            message = f"Model {shown(name)} does not exist here; this server has {shown(served)}."
            raise ApiError(404, message, code="model_not_found", param="model")

    async def completion_job(self, body: schemas.CompletionRequest, arrived: float) -> Job:
        self.check_model(body.model)
        if body.best_of is not None and body.best_of != (body.n or 1):
            raise ApiError(400, "best_of: only null or the value of n", code="invalid_value", param="best_of")
        several = isinstance(body.prompt, list) and isinstance(body.prompt[0], (str, list))
        self._check_count(body.n or 1, len(body.prompt) if several else 1)
        prompts = await self.read(read_prompts, body.prompt, self.engine.tokenizer)
        return self._job(CompletionForm(), body, prompts, body.max_tokens, body.logprobs, arrived)

    async def chat_job(self, body: schemas.ChatRequest, arrived: float) -> Job:
        self.check_model(body.model)
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs: needs logprobs = true", code="invalid_value", param="top_logprobs")
        self._check_count(body.n or 1, 1)
        prompt = await self.read(read_messages, body.messages, self.engine.tokenizer)
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        limits = {limit for limit in (body.max_tokens, body.max_completion_tokens) if limit is not None}
        if len(limits) > 1:
            message = "max_tokens and max_completion_tokens differ: give one"
            raise ApiError(400, message, code="invalid_value", param="max_tokens")
        return self._job(ChatForm(), body, [prompt], next(iter(limits), None), logprobs, arrived)

    def _check_count(self, n: int, num_prompts: int) -> None:
        most = min(self.settings.max_choices, self.settings.max_concurrent)
        if n * num_prompts > most:
            message = f"{num_prompts} prompts × n = {n} are {n * num_prompts} answers; at most {most} a request"
            raise ApiError(400, message, code="too_many_choices", param="n" if num_prompts == 1 else "prompt")

    def _job(
        self,
        form: Form,
        body: schemas.Generation,
        prompts: Sequence[Ids],
        max_tokens: int | None,
        logprobs: int | None,
        arrived: float,
    ) -> Job:
        n = body.n or 1
        if body.stream_options is not None and not body.stream:
            raise ApiError(400, "stream_options: needs stream = true", code="invalid_value", param="stream_options")
        requests = [
            Request(
                prompt_ids=prompt,
                max_new_tokens=self.output_limit(max_tokens),
                scale=body.scale,
                sampling=_sampling(body, logprobs, choice),
                beyond_trained=bool(body.beyond_trained),
            )
            for prompt in prompts
            for choice in range(n)
        ]
        usage = bool(body.stream_options and body.stream_options.include_usage)
        stream = bool(body.stream)
        return Job(form=form, requests=tuple(requests), n=n, stream=stream, include_usage=usage, arrived=arrived)

    def output_limit(self, max_tokens: int | None) -> int | None:
        """max_tokens within the operator's limit. Raises ApiError 400 above it."""
        most = self.settings.max_output_tokens
        if most is not None and max_tokens is not None and max_tokens > most:
            message = f"max_tokens = {max_tokens}: this server writes at most {most} tokens an answer"
            raise ApiError(400, message, code="max_tokens_too_large", param="max_tokens")
        return most if max_tokens is None and most is not None and most < 1024 else max_tokens

    def model_card(self) -> shapes.Model:
        engine = self.engine
        steps = steps_of(engine.native_window, engine.max_scale, engine.schedule)
        info: shapes.ModelInfo = {
            "engine": engine.name,
            "native_window": engine.native_window,
            "max_scale": engine.max_scale,
            "max_window": self.max_window,
            "windows": [{"window": step.window, "scale": step.scale} for step in steps],
            "chat": has_chat_template(engine.tokenizer),
        }
        return {
            "id": self.settings.model_name,
            "object": "model",
            "created": self.started,
            "owned_by": "e2llm",
            "max_model_len": self.max_window,
            "e2llm": info,
        }


def _sampling(body: schemas.Generation, logprobs: int | None, choice: int) -> Sampling:
    """Sampling of one of n answers: with a seed each draws from its own."""
    seed = None if body.seed is None else (body.seed + choice + _SEEDS) % (2 * _SEEDS) - _SEEDS
    temperature = DEFAULT_TEMPERATURE if body.temperature is None else body.temperature
    try:
        return Sampling(
            temperature=temperature if temperature >= GREEDY_BELOW else 0.0,
            top_p=1.0 if body.top_p is None else max(body.top_p, _SMALLEST_TOP_P),
            top_k=body.top_k or 0,
            min_p=body.min_p or 0.0,
            seed=seed,
            stop=body.stops(),
            logprobs=logprobs,
            ignore_eos=bool(body.ignore_eos),
        )
    except ValueError as error:
        raise ApiError(400, str(error), code="invalid_value", param=str(error).split(" ")[0]) from error
