"""What an operator decides about a server, and where its API keys come from. No FastAPI.

Flows in: options, a key file, the environment. Flows out: a frozen `ServerSettings`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

KEYS_VARIABLE = "E2LLM_API_KEYS"
"""Environment variable with API keys, separated by commas."""
SHORTEST_KEY = 8


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Limits and habits of a server. "Sequence" is one text that is continued: prompts × n of a request."""

    model_name: str = "e2llm"
    """What clients call the model."""
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    """Any of them opens /v1; empty: no key is asked for. Never shown or logged."""
    max_request_bytes: int = 16 * 2**20
    """Largest request body; more is answered with 413."""
    max_concurrent: int = 64
    """Sequences handed to the engine at once."""
    max_queue: int = 256
    """Sequences that wait for one of those places; beyond it 429 with Retry-After."""
    max_choices: int = 16
    """Sequences of one request (prompts × n)."""
    max_output_tokens: int | None = None
    """Largest max_tokens of a request; None: what the window and the memory hold."""
    requests_per_minute: float | None = None
    """For each key, or each client address where there are no keys; None: no limit."""
    burst: int = 10
    """Requests that may come at once before `requests_per_minute` slows them."""
    request_timeout_seconds: float = 600.0
    """From a request's arrival to its last token, waiting included."""
    body_timeout_seconds: float = 60.0
    """Longest pause between two pieces of a request body."""
    ping_seconds: float = 15.0
    """Silence in a stream after which a comment is sent, so that nothing in between takes it for dead."""
    shutdown_seconds: float = 30.0
    """How long running answers may go on after a signal to stop."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may call this server; empty: no other page may."""
    log_prompts: bool = False
    """Write prompts and error details into the log."""

    def __post_init__(self) -> None:
        for name in ("max_request_bytes", "max_concurrent", "max_choices", "burst"):
            _check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        _check(self.max_queue >= 0, "max_queue", self.max_queue, "0 (nobody waits) or more")
        tokens = self.max_output_tokens
        _check(tokens is None or tokens >= 1, "max_output_tokens", tokens, "at least 1, or None")
        rate = self.requests_per_minute
        _check(rate is None or (math.isfinite(rate) and rate > 0), "requests_per_minute", rate, "more than 0, or None")
        for name in ("request_timeout_seconds", "body_timeout_seconds", "ping_seconds"):
            seconds = getattr(self, name)
            _check(math.isfinite(seconds) and seconds > 0, name, seconds, "a finite time above 0")
        _check(self.shutdown_seconds >= 0, "shutdown_seconds", self.shutdown_seconds, "0 or more")
        _check(bool(self.model_name.strip()), "model_name", self.model_name, "a name of at least one character")
        if any(len(key) < SHORTEST_KEY for key in self.api_keys):  # the key itself is never shown
            raise ValueError(f"api_keys: a key has fewer than {SHORTEST_KEY} characters; use longer ones")


def _check(condition: bool, name: str, value: object, remedy: str) -> None:
    if not condition:
        raise ValueError(f"{name} = {value!r}: use {remedy}")


def load_api_keys(path: str | None, environment: Mapping[str, str]) -> tuple[str, ...]:
    """Keys of a file (one a line, `#` begins a comment) and of the environment, each once, in order.

    Raises ValueError for a file that cannot be read or holds no key: a server asked for keys never starts without.
    """
    found = [key.strip() for key in environment.get(KEYS_VARIABLE, "").split(",")]
    if path is not None:
        try:
            text = Path(path).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"api-key-file = {path!r}: cannot be read ({error})") from error
        lines = [line.partition("#")[0].strip() for line in text.splitlines()]
        if not any(lines):
            raise ValueError(f"api-key-file = {path!r}: holds no key; write one a line")
        found += lines
    return tuple(dict.fromkeys(key for key in found if key))
