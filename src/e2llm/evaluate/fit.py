"""Prompts of an exact length: the most text whose tokens still fit, whatever the tokenizer.

Flows in: a function from a size (words, sentences, pairs) to a text, a tokenizer, a length in tokens. Flows out: the
largest text that fits, with its tokens. A prompt is tokenized as a whole, as a user's would be, so its length is
measured and never added up from parts. Knows no task.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

CLOSE = 2
"""Tokens below the limit that end the search; a larger gap stays only where one unit more would not fit."""
_SLOT = "\x00body\x00"


@dataclass(frozen=True)
class Frame:
    """What stands around a prompt's text: begin of text, or a chat template."""

    tokenizer: Any
    chat: bool
    first: int | None
    """Token put before a text; None where the tokenizer puts none, or the chat template does."""

    def encode(self, body: str, answer_start: str) -> list[int]:
        """Tokens of the prompt; `answer_start` is what the answer begins with, so the model goes on from there."""
        text = body + answer_start
        if self.chat:
            message = {"role": "user", "content": body}
            asked = self.tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
            text = asked + answer_start.strip()
        ids = list(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
        return ids if self.first is None else [self.first, *ids]


def make_frame(tokenizer: Any, chat: bool) -> Frame:
    """Raises ValueError without a tokenizer, or for chat with a tokenizer that has no template."""
    if tokenizer is None:
        raise ValueError("tokenizer = None: questions are asked in text; load the model with its tokenizer")
    if chat and getattr(tokenizer, "chat_template", None) is None:
        raise ValueError("chat = True: this tokenizer has no chat template; use chat = False")
    return Frame(tokenizer, chat, None if chat else begin_of_text(tokenizer))


def begin_of_text(tokenizer: Any) -> int | None:
    """The token that the tokenizer puts before a text by itself, None where it puts none."""
    first = getattr(tokenizer, "bos_token_id", None)
    ids = tokenizer("a").input_ids
    return first if first is not None and ids and ids[0] == first else None


@dataclass(frozen=True)
class Fitted:
    """The largest text that fits."""

    size: int
    token_ids: tuple[int, ...]


def largest_fit(
    encode: Callable[[int], list[int]], limit: int, *, least: int, most: int, what: str, guess: int | None = None
) -> Fitted:
    """Largest size in least…most whose tokens number at most `limit`, or within `CLOSE` of it.

    A few tokenizations: sizes are guessed from the tokens that a unit took so far, within bounds that close in. Raises
    ValueError naming `what` when not even `least` fits.
    """
    found = encode(least)
    if len(found) > limit:
        raise ValueError(f"{what}: needs {len(found)} tokens at the least, and {limit} are left for the prompt")
    low, low_ids, high, high_tokens = least, found, most + 1, None
    size = min(most, max(least + 1, guess if guess is not None else least + max(1, (limit - len(found)) // 8)))
    while high - low > 1 and limit - len(low_ids) > CLOSE:
        size = min(max(size, low + 1), high - 1)
        ids = encode(size)
        if len(ids) <= limit:
            low, low_ids = size, ids
        else:
            high, high_tokens = size, len(ids)
        size = _next(low, len(low_ids), high, high_tokens, limit, start=(least, len(found)))
    return Fitted(low, tuple(low_ids))


def _next(low: int, low_tokens: int, high: int, high_tokens: int | None, limit: int, *, start: tuple[int, int]) -> int:
    """The next size to try: on the line through the two nearest measured sizes."""
    if high_tokens is not None:
        return low + int((limit - low_tokens) * (high - low) / max(1, high_tokens - low_tokens))
    each = (low_tokens - start[1]) / max(1, low - start[0])  # tokens a unit so far
    return low + max(1, int((limit - low_tokens) / each)) if each > 0 else 2 * low + 1
