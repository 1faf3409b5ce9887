"""Tokens to text, piece by piece: whole characters only, nothing that may yet begin a stop string.

Flows in: one token after another. Flows out: text whose concatenation is the tokenizer's `decode` of all tokens
without special tokens, cut before the first stop string. One exception: a tokenizer with byte tokens decodes a run of
them as halves of characters all through when one byte is wrong; characters that were shown before it stay.
"""

from __future__ import annotations

from typing import Any

WINDOW_TOKENS = 16
"""Tokens decoded again with every new one at most, unless their text cannot be cut apart there."""
KEPT_TOKENS = 6
_CLEANED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")
"""What `clean_up_tokenization_spaces` rewrites: text that ends in the beginning of one is not final yet."""
_HALF = "\ufffd"


class TextStream:
    """The text of one request so far."""

    def __init__(self, tokenizer: Any, stops: tuple[str, ...]) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        cleans = getattr(tokenizer, "clean_up_tokenization_spaces", False)
        self._held = stops + (_CLEANED if cleans else ())
        self._window: list[int] = []
        self._head = ""
        """Text before the window's; only what is not out yet."""
        self._sent = 0
        """Characters of head and window that are out."""
        self._text = ""
        """Head and the window's text."""

    def push(self, token: int) -> tuple[str, bool]:
        """Text that can be shown after `token`, and whether a stop string ended it."""
        if self._tokenizer is None:
            return "", False
        self._window.append(token)
        self._text = self._head + self._decode(self._window)
        found = [place for stop in self._stops if (place := self._text.find(stop, self._sent)) >= 0]
        if found:
            self._text = self._text[: min(found)]
            return self.rest(), True
        end = max(self._sent, self._final())
        piece, self._sent = self._text[self._sent : end], end
        if len(self._window) > WINDOW_TOKENS:
            self._slide()
        return piece, False

    def rest(self) -> str:
        """What was held back; the text ends here."""
        piece, self._sent = self._text[self._sent :], len(self._text)
        return piece

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def _final(self) -> int:
        """How much of the text no later token can change or turn into a stop string."""
        whole = self._text.rstrip(_HALF)
        end = len(whole)
        for held in self._held:
            for size in range(min(len(held) - 1, len(whole)), 0, -1):
                if whole.endswith(held[:size]):
                    end = min(end, len(whole) - size)
                    break
        return end

    def _slide(self) -> None:
        """Move the window on, if the text of its last tokens alone is how the text of all ends; else later."""
        tail = self._decode(self._window[-KEPT_TOKENS:])
        if not tail or not self._text.endswith(tail):
            return
        head = self._text[: len(self._text) - len(tail)]
        out = min(self._sent, len(head))
        self._head, self._sent = head[out:], self._sent - out
        self._window = self._window[-KEPT_TOKENS:]
        self._text = self._head + tail
