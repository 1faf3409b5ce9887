"""A conversation: what has been said, how it becomes a prompt, and one answer after another from an engine.

Flows in: what the user says, a `ServingEngine`. Flows out: pieces of text, and what each answer ran at. Knows no
terminal.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from e2llm.engine.request import Admission, Request, Sampling, ServingEngine, Stream
from e2llm.infer import plan_request

NO_TEMPLATE = (
    "this model has no chat template: it continues texts and answers no questions. Give --raw to write one text "
    "together with it, or use a checkpoint whose tokenizer_config.json has a chat_template"
)


@dataclass
class Turn:
    """One answer's figures."""

    admission: Admission
    tokens: int = 0
    first_token_seconds: float | None = None
    seconds: float = 0.0
    end: str = "cancelled"
    """stop, length, cancelled or error."""
    error: str | None = None

    @property
    def tokens_per_second(self) -> float | None:
        """Of the tokens after the first; None where there are none."""
        if self.tokens < 2 or self.first_token_seconds is None:
            return None
        return (self.tokens - 1) / max(self.seconds - self.first_token_seconds, 1e-9)


@dataclass(kw_only=True)
class Options:
    """How answers are made."""

    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int | None = None
    raw: bool = False
    """One text that user and model write in turn, without a chat template."""
    system: str | None = None
    beyond_trained: bool = False


class Conversation:
    """Messages and figures so far. `window`: tokens that every answer's scale must at least hold (None: as few as the
    conversation needs). Raises ValueError for a model without a chat template, unless raw."""

    def __init__(self, engine: ServingEngine, options: Options) -> None:
        if not options.raw and not getattr(engine.tokenizer, "chat_template", None):
            raise ValueError(NO_TEMPLATE)
        self.engine, self.options = engine, options
        self.window: int | None = None
        self.turns: list[Turn] = []
        self._files: list[str] = []
        self.reset()

    def reset(self) -> None:
        """Forget what was said; the window stays."""
        system = self.options.system
        self.messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
        self._raw = system or ""
        self._files.clear()
        self.turns.clear()

    def add_file(self, path: str) -> int:
        """Put a file's text before the next thing that is said; its length in characters. Raises ValueError."""
        try:
            text = Path(path).expanduser().read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not a text in UTF-8") from error
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from error
        self._files.append(text)
        return len(text)

    def set_window(self, tokens: int | None) -> float:
        """Read from now on at the scale of at least `tokens`; that scale. Raises ValueError outside what was
        trained."""
        largest = int(self.engine.native_window * self.engine.max_scale)
        if tokens is not None and not 1 <= tokens <= largest and not self.options.beyond_trained:
            raise ValueError(f"window = {tokens}: use 1 to {largest} tokens, the largest trained window")
        self.window = tokens
        return 1.0 if tokens is None else self._plan(max(tokens - 1, 1), 1, None).scale

    def say(self, text: str) -> Answer:
        """Start an answer to `text`. Raises ValueError, with the conversation as it was, for what cannot be answered:
        too long for the model or its memory, or not to the chat template's liking."""
        content = "\n\n".join([*self._files, text] if text else self._files)
        if self.options.raw:
            ids = self.engine.tokenizer(self._raw + content).input_ids
        else:
            said = [*self.messages, {"role": "user", "content": content}]
            prompt = self._through_template(said)
            ids = self.engine.tokenizer(prompt, add_special_tokens=False).input_ids
        stream = self.engine.submit(self._request(tuple(ids)))
        self._files.clear()
        if self.options.raw:
            self._raw += content
        else:
            self.messages = said
        turn = Turn(stream.admission)
        self.turns.append(turn)
        return Answer(self, stream, turn)

    def heard(self, text: str) -> None:
        """The answer, whole or as far as it came."""
        if self.options.raw:
            self._raw += text
        else:
            self.messages.append({"role": "assistant", "content": text})

    def _through_template(self, said: list[dict[str, str]]) -> str:
        from jinja2 import TemplateError

        try:
            text: str = self.engine.tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise ValueError(f"the model's chat template refuses this conversation: {error}") from error
        return text

    def _request(self, ids: tuple[int, ...]) -> Request:
        options, scale = self.options, None
        if self.window is not None:
            needed = self._plan(len(ids), options.max_new_tokens, None).scale if ids else 1.0
            scale = max(needed, self.set_window(self.window))
        return Request(
            prompt_ids=ids,
            max_new_tokens=options.max_new_tokens,
            scale=scale,
            sampling=options.sampling,
            beyond_trained=options.beyond_trained,
        )

    def _plan(self, prompt_tokens: int, max_new_tokens: int | None, scale: float | None) -> Any:
        return plan_request(
            prompt_tokens,
            native_window=self.engine.native_window,
            max_scale=self.engine.max_scale,
            schedule=self.engine.schedule,
            max_new_tokens=max_new_tokens,
            scale=scale,
        )


class Answer:
    """An answer that is being written: iterate for its text. However it ends, the conversation has what was shown."""

    def __init__(self, conversation: Conversation, stream: Stream, turn: Turn) -> None:
        self.turn = turn
        self._conversation, self._stream = conversation, stream
        self._start = time.perf_counter()

    def __iter__(self) -> Iterator[str]:
        turn, shown = self.turn, []
        try:
            for output in self._stream:
                turn.tokens += len(output.token_ids)
                if output.token_ids and turn.first_token_seconds is None:
                    turn.first_token_seconds = time.perf_counter() - self._start
                if output.finish_reason is not None:
                    turn.end, turn.error = output.finish_reason, output.error
                if output.text:
                    shown.append(output.text)
                    yield output.text
        finally:  # an end, an interruption, or a caller that stops iterating
            self._stream.cancel()
            turn.seconds = time.perf_counter() - self._start
            self._conversation.heard("".join(shown))
