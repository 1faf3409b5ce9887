"""What goes into a serving engine and what comes out of it; every engine and every front end speaks these types.

Flows in: `Request`. Flows out: `Stream`, an iterator of `Output` whose last one has a `finish_reason`. No torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from e2llm.positions.choose import Schedule

FinishReason = Literal["stop", "length", "cancelled", "error"]
MAX_TOP_LOGPROBS = 20


class RefusedError(ValueError):
    """A request that this engine will never serve as asked: longer than what was trained, or than its memory."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn and what ends the text."""

    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    """Smallest set of tokens whose probability reaches this share; 1 keeps all."""
    top_k: int = 0
    """Most probable tokens kept; 0 keeps all."""
    min_p: float = 0.0
    """Tokens kept have at least this share of the largest probability; 0 keeps all."""
    seed: int | None = None
    """With a seed the draws depend on it and the text alone, whatever else is in the batch."""
    stop: tuple[str, ...] = ()
    """Strings that end the text; not part of it."""
    logprobs: int | None = None
    """Alternatives a token whose log probabilities are returned (0: the token's own alone); None: none at all."""
    ignore_eos: bool = False
    """Go on after an end-of-text token (benchmarks)."""

    def __post_init__(self) -> None:
        _check(0 <= self.temperature <= 100, "temperature", self.temperature, "0 (greedy) to 100")
        _check(0 < self.top_p <= 1, "top_p", self.top_p, "a share above 0 and at most 1")
        _check(self.top_k >= 0, "top_k", self.top_k, "0 (all) or more")
        _check(0 <= self.min_p <= 1, "min_p", self.min_p, "a share between 0 and 1")
        _check(all(self.stop), "stop", self.stop, "strings of at least one character")
        known = self.logprobs is None or 0 <= self.logprobs <= MAX_TOP_LOGPROBS
        _check(known, "logprobs", self.logprobs, f"0…{MAX_TOP_LOGPROBS}, or None")


def _check(condition: bool, name: str, value: object, remedy: str) -> None:
    if not condition:
        raise ValueError(f"{name} = {value!r}: use {remedy}")


@dataclass(frozen=True, kw_only=True)
class Request:
    """One text to continue."""

    prompt_ids: tuple[int, ...]
    """Tokens as the model reads them, special tokens included."""
    max_new_tokens: int | None = None
    """None: 1024, and never beyond the scale's window (`infer.plan_request`)."""
    scale: float | None = None
    """None: chosen from prompt + new tokens."""
    sampling: Sampling = field(default_factory=Sampling)
    beyond_trained: bool = False
    """Serve a request longer than the largest window that was trained, with a warning, instead of refusing it."""


@dataclass(frozen=True)
class TokenLogprob:
    """Log probability (nats, of the model's own distribution at temperature 1) of a token and its alternatives."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """(token id, log probability), most probable first."""


@dataclass(frozen=True)
class Output:
    """One piece of an answer."""

    text: str = ""
    """New text that can be shown: whole characters, nothing that may yet turn out to begin a stop string."""
    token_ids: tuple[int, ...] = ()
    """New tokens."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """One for each of `token_ids`, where they were asked for."""
    finish_reason: FinishReason | None = None
    """Set in the last output."""
    error: str | None = None
    """With finish_reason `error`: what went wrong."""


@dataclass(frozen=True)
class Admission:
    """What was fixed when the request was taken."""

    scale: float
    window: int
    """Tokens (prompt + new) that the scale is made for."""
    prompt_tokens: int
    max_new_tokens: int
    warnings: tuple[str, ...] = ()


class Stream(Protocol):
    """A running request. Iterating blocks until the next output; the last one has a finish_reason."""

    admission: Admission

    def __iter__(self) -> Iterator[Output]: ...

    def cancel(self) -> None:
        """Stop; memory is freed before the next step. The iterator ends with finish_reason `cancelled`. Any thread,
        any time, more than once."""
        ...


@dataclass(frozen=True)
class EngineStats:
    """A snapshot, for metrics and tests."""

    running: int
    waiting: int
    kv_tokens_used: int
    """Token slots held by running requests and the prefix cache."""
    kv_tokens_total: int
    prompt_tokens_total: int
    """Since the start: tokens prefilled (those found in the prefix cache not counted)."""
    cached_tokens_total: int
    """Since the start: prompt tokens found in the prefix cache."""
    output_tokens_total: int
    attention: str = ""
    """How decoding attends, in words; for those who wonder why it is slow."""
    turned_tokens_total: int = 0
    """Since the start, of the cached ones: tokens whose keys were turned from another scale."""


class ServingEngine(Protocol):
    """What the server, the chat and the benchmarks need."""

    tokenizer: Any
    native_window: int
    max_scale: float
    schedule: Schedule
    """Calibrated scale for each window; () is the ladder."""
    name: str
    """Label: e2llm, vllm, llamacpp."""

    def submit(self, request: Request) -> Stream:
        """Take a request; returns at once. Thread-safe. Raises RefusedError (never possible), ValueError
        (malformed)."""
        ...

    def stats(self) -> EngineStats: ...

    def close(self, *, drain: bool = False) -> None:
        """Stop the engine's thread; with `drain` after the running requests are done. Later submits raise
        RuntimeError."""
        ...
