"""What one token is as text and as bytes, for log probabilities.

A byte-level vocabulary cuts inside characters: such a token's text has replacement characters, its bytes are exact.
"""

from __future__ import annotations

import functools
import re
from typing import Any

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_WORD_START = "▁"
"""SentencePiece's mark for a space."""


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """Character of a byte-level vocabulary -> byte: printable bytes stand for themselves, the rest from U+0100 on.
    (Radford et al. 2019, GPT-2's byte-level BPE.)"""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    return alphabet | {chr(256 + i): byte for i, byte in enumerate(others)}


class TokenText:
    """Texts of a tokenizer's tokens, remembered."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, tuple[str, bytes]] = {}

    def __call__(self, token_id: int) -> tuple[str, bytes]:
        """(text as it would be shown alone, bytes)."""
        if token_id not in self._known:
            self._known[token_id] = self._read(token_id)
        return self._known[token_id]

    def _read(self, token_id: int) -> tuple[str, bytes]:
        text = self._tokenizer.decode([token_id], skip_special_tokens=False)
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if not isinstance(token, str):  # an id that a padded vocabulary has and the tokenizer does not
            return text, text.encode("utf-8", "replace")
        if found := _BYTE_TOKEN.fullmatch(token):
            return text, bytes([int(found[1], 16)])
        if token.startswith(_WORD_START) and not text.startswith(" "):  # decoded alone it loses its space
            text = " " + text
        alphabet = _byte_alphabet()
        if "\ufffd" in text and all(character in alphabet for character in token):
            return text, bytes(alphabet[character] for character in token)
        return text, text.encode("utf-8", "replace")
