"""Whether a tokenizer can write a text: what it has no tokens for is answered wrongly every time, or predicted free.

Flows in: a tokenizer, texts or token ids. Flows out: nothing, or a ValueError that says what is lost. Case, white space
and Unicode's spellings of the same may change, as an uncased tokenizer changes them. Knows no task.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

MOST_LOST = 0.02
"""Share of a text's characters that a tokenizer may lose (odd symbols) before the text is given up."""
MOST_UNKNOWN = 0.01
"""Share of a document's tokens that may be the unknown token: it is easily predicted, so that a perplexity over many
reads as good."""
REMEDY = "use a model whose tokenizer can write it, or leave it out"


def check_writes(tokenizer: Any, text: str, ids: Sequence[int]) -> None:
    """ValueError where more than MOST_LOST of the text's characters do not come back from its ids."""
    lost = _lost(tokenizer, text, ids)
    share = lost.total() / max(1, len(_comparable(text)))
    if share > MOST_LOST:
        raise ValueError(f"the tokenizer cannot encode it: {share:.0%} of its characters are lost ({_shown(lost)} …)")


def check_keeps(tokenizer: Any, text: str, parts: Sequence[str]) -> None:
    """As `check_writes`, and ValueError where one of `parts`, which stand in the text, does not come back whole."""
    ids = encode(tokenizer, text)
    read = tokenizer.decode(ids)
    for part in parts:
        if _comparable(part) not in _comparable(read):
            raise ValueError(f"the tokenizer cannot encode {part!r}: {text!r} reads back as {read!r}")
    check_writes(tokenizer, text, ids)


def as_written(tokenizer: Any, answer: str) -> str:
    """An answer as a model would write it: encoded and decoded."""
    return str(tokenizer.decode(encode(tokenizer, answer), skip_special_tokens=True))


def check_known(tokenizer: Any, tokens: np.ndarray, beginning: str) -> None:
    """ValueError where more than MOST_UNKNOWN of a document's `tokens` (T,) are the unknown token, or, with a tokenizer
    that has none, where it drops more than MOST_LOST of the text's `beginning`."""
    unknown = _unknown_token(tokenizer)
    if unknown is not None:
        share = float(np.mean(tokens == unknown)) if len(tokens) else 0.0
        if share > MOST_UNKNOWN:
            lost = _shown(_lost(tokenizer, beginning, encode(tokenizer, beginning)))
            raise ValueError(
                f"the tokenizer cannot encode it: {share:.1%} of its {len(tokens)} tokens are the unknown token, at "
                f"most {MOST_UNKNOWN:.0%} may be" + (f" ({lost} …)" if lost else "")
            )
    elif hasattr(tokenizer, "decode"):
        check_writes(tokenizer, beginning, encode(tokenizer, beginning))


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids without special tokens; none for no text."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids) if text else []


def _unknown_token(tokenizer: Any) -> int | None:
    """The token of text that the tokenizer does not know. Some have one in their core and do not declare it."""
    declared = getattr(tokenizer, "unk_token_id", None)
    if declared is not None:
        return int(declared)
    name = getattr(getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None), "unk_token", None)
    return None if name is None else int(tokenizer.convert_tokens_to_ids(name))


def _lost(tokenizer: Any, text: str, ids: Sequence[int]) -> Counter[str]:
    """Characters of the text that do not come back, and how often."""
    return Counter(_comparable(text)) - Counter(_comparable(tokenizer.decode(list(ids))))


def _shown(lost: Counter[str]) -> str:
    return " ".join(character for character, _ in lost.most_common(5))


def _comparable(text: str) -> str:
    """Without white space, case and Unicode's spellings of the same: what an uncased tokenizer still keeps."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())
